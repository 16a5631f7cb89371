"""What the commands do, apart from reading options and printing."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from lrp.errors import ColumnError, DataError, RuleError, TargetError, UnverifiedError
from neuralize._files import replacing
from neuralize._words import words
from neuralize.audit import Decisions, conservation, decisions
from neuralize.conversion import neuralize
from neuralize.explanation import Explanation
from neuralize.page import alternatives
from neuralize.readers import read_estimator, read_frame, read_labelled, read_pickle
from neuralize.recipes import fit
from neuralize.sentences import Portrait, describe

if TYPE_CHECKING:
    import pandas as pd

    from neuralize.network import NeuralizedModel
    from neuralize.reasons import Reason

__all__ = [
    "Opened",
    "Question",
    "Report",
    "Source",
    "asked",
    "describe_rows",
    "explain",
    "label_of",
    "opened",
    "plain",
    "write_json",
    "writing",
]


_AMONG = 1000


@dataclass(frozen=True)
class Source:
    """A table, and a model of it: a file, or a recipe to fit."""

    data: str
    model: Path | None = None
    pickle: Path | None = None
    fit: str | None = None
    prepare: bool = False
    label: str | None = None
    header: bool | None = None
    drop: Sequence[str] = ()
    columns: Sequence[str] = ()
    seed: int = 0
    device: str | None = None


@dataclass(frozen=True)
class Question:
    """What is asked of the rows, as the user typed it."""

    target: str | None = None
    contrast: str | None = None
    beta: str = "auto"
    rule: str = "auto"
    output: str = "logit"
    level: str | None = None
    reference: bool = False
    top: int | None = None


@dataclass(frozen=True)
class Opened:
    """A table with its model and the model's network, which have been compared."""

    frame: pd.DataFrame
    fitted: Any
    net: NeuralizedModel
    own: npt.NDArray[Any]
    same: Decisions


@dataclass(frozen=True)
class Report:
    """What a command prints: lines for people, or one JSON document."""

    lines: list[str]
    summary: dict[str, Any]


# ---------------------------------------------------------------------- opening


def opened(source: Source) -> Opened:
    """Read the table, read or fit the model, convert it, and compare the two on every row.

    Raises
    ------
    LRPError
        What can't be read, fitted or converted.
    UnverifiedError
        The network and the estimator differ.
    """
    given = [source.model, source.pickle, source.fit]
    if sum(g is not None for g in given) != 1:
        raise RuleError("give exactly one of --model FILE.skops, --allow-pickle FILE, or --fit RECIPE such as kmeans:3")
    if source.fit is None and (source.prepare or source.label is not None):
        raise RuleError("--scale, --prepare and --target-column belong to --fit; a model brings its own preparation")
    options: dict[str, Any] = {"header": source.header, "drop": source.drop, "columns": source.columns}
    labels = None
    if source.label is None:
        frame = read_frame(source.data, **options)
    else:
        frame, labels = read_labelled(source.data, source.label, **options)
    if source.fit is not None:
        fitted = fit(source.fit, frame, labels, prepare=source.prepare, seed=source.seed)
    elif source.model is not None:
        fitted = read_estimator(source.model)
    else:
        assert source.pickle is not None
        print(
            f"warning: unpickling {source.pickle} runs the code that it holds: open only files that you trust",
            file=sys.stderr,
            flush=True,
        )
        fitted = read_pickle(source.pickle)
    net = neuralize(fitted)._on(source.device)
    if net.feature_names is None and net.n_features == frame.shape[1]:
        net.feature_names = tuple(frame.columns)
    if net.labels.dtype.kind == "O" and all(isinstance(label, str) for label in net.labels):
        # the same labels, as files can hold them without pickle
        net.labels = np.array(net.labels.tolist(), dtype=np.str_)
    with _columns_advice(net):
        own = net.predict(frame)
    same = decisions(net, fitted, frame)
    if same.otherwise:
        raise UnverifiedError(
            f"contract broken: {same.otherwise:,} of {same.total:,} rows are decided otherwise by the estimator; "
            "nothing written"
        )
    return Opened(frame, fitted, net, own, same)


@contextmanager
def _columns_advice(net: NeuralizedModel) -> Iterator[None]:
    """Say how to choose the columns here, not in Python."""
    try:
        yield
    except ColumnError as error:
        names = net.feature_names
        if names is None:
            raise
        told = "choose these columns in the table" if any("," in n for n in names) else ""
        fix = told or f"--columns {shlex.quote(','.join(names))}"
        raise ColumnError(error.what, expected=error.expected, got=error.got, fix=fix) from error


def itself(kind: str, label: Any) -> str:
    """Rows of a label: "in cluster 2 itself"."""
    return (
        f"among the {words(kind).head(label).lower()}" if kind == "outlier" else f"in {words(kind).name(label)} itself"
    )


def label_of(text: str | None, net: NeuralizedModel) -> Any:
    """A label as typed by the user, in the type of the labels."""
    if text is None:
        return None
    if net.kind == "outlier":
        text = {"outlier": "-1", "inlier": "1"}.get(text, text)
    return next((label for label in net.labels.tolist() if str(label) == text), text)


def _stiffness(beta: str) -> float | str:
    if beta == "auto":
        return beta
    try:
        return float(beta)
    except ValueError:
        raise RuleError(
            "--beta is no number", expected="auto, a number > 0 or inf", got=beta, fix="for example --beta 0.5"
        ) from None


def _set_level(net: NeuralizedModel, level: str | None, frame: pd.DataFrame) -> None:
    if level is None:
        return
    if net.kind != "value":
        net.set_level(0.0)  # raises, with the reason
    if level == "mean":
        net.set_reference(frame)
        return
    try:
        net.set_level(float(level))
    except ValueError:
        raise RuleError(
            "--level is no number",
            expected="a value of the regression, or mean",
            got=level,
            fix="for example --level 0",
        ) from None


# ---------------------------------------------------------------------- asking


def asked(
    world: Opened, question: Question, rows: npt.NDArray[np.int64] | None = None
) -> tuple[Explanation, npt.NDArray[np.int64]]:
    """The explanation of some rows (all by default), and the positions of those it is of.

    Rows of the contrast itself have no answer to "why its own rather than the
    contrast", and are left out.
    """
    net = world.net
    beta = _stiffness(question.beta)
    wanted, rival = label_of(question.target, net), label_of(question.contrast, net)
    if question.reference or question.rule == "shapley":
        net.set_reference(world.frame)
    _set_level(net, question.level, world.frame)
    rows = np.arange(len(world.frame)) if rows is None else rows
    if wanted is None and rival in net.labels.tolist():
        rows = rows[world.own[rows] != rival]
        if not len(rows):
            raise TargetError(
                f"every row is {itself(net.kind, rival)}",
                expected="other rows",
                got="none",
                fix="give --target, or another --contrast",
            )
    frame = world.frame if len(rows) == len(world.frame) else world.frame.iloc[rows]
    ex = net.explain(frame, wanted, rival, beta, question.rule, question.output, top=question.top)
    gap = conservation(ex)
    if gap > 1e-9:
        raise UnverifiedError(f"contract broken: conservation to {gap:.2g} (1e-9 allowed); nothing written")
    return ex, rows


# ---------------------------------------------------------------------- explain


def explain(source: Source, question: Question, folder: Path, picker: bool = False) -> Report:
    """Explain every row, and write what was found; with a picker of other questions on the page, if asked for."""
    world = opened(source)
    ex, rows = asked(world, question)
    left_out = len(world.frame) - len(rows)
    others = _others(world, question, rows) if picker else None
    portraits = describe(ex)
    summary = _summary(ex, portraits, world.same, left_out) | {"fit": source.fit}
    name = Path(source.data).name
    with writing(folder):
        ex.save(folder / "explanations.npz")
        _write_values(ex, folder / "values.csv")
        ex.to_html(folder / "index.html", title=_title(ex, name), alternatives=others)
        write_json(summary, folder / "summary.json")
    lines = [p.sentence for p in portraits] + _remarks(ex, world, question, left_out)
    lines.append(f"Written to {folder}: explanations.npz, values.csv, index.html, summary.json")
    return Report(lines, summary)


def _others(world: Opened, question: Question, rows: npt.NDArray[np.int64]) -> dict[str, Explanation]:
    """Explanations of the same rows for every label."""
    if question.top is not None:
        raise RuleError("--alternatives needs all values: drop --top")
    if len(world.net.labels) < 2:
        raise RuleError("--alternatives needs several labels, and this model gives one number")
    options: dict[str, Any] = {"beta": _stiffness(question.beta), "output": question.output}
    # a row's own rule may not be defined for other labels
    options["rule"] = "auto" if question.rule in ("divided", "shapley") else question.rule
    return alternatives(world.net, world.frame.iloc[rows], **options)


def _title(ex: Explanation, name: str) -> str:
    told = words(ex.kind)
    if ex.kind in ("cluster", "class") and bool((ex.target == ex.decided).all()):
        return f"What sets the {told.several.lower()} of {name} apart"
    return f"{name}: {ex.question}"


def _remarks(ex: Explanation, world: Opened, question: Question, left_out: int) -> list[str]:
    lines = []
    if left_out:
        rival = itself(ex.kind, label_of(question.contrast, world.net))
        lines.append(f"Left out: {left_out:,} row{'s' * (left_out != 1)} {rival}.")
    votes = int(np.sum(ex.notes["votes"])) if "votes" in ex.notes else 0
    if votes:
        lines.append(f"Decided by votes, without an outright winner: {votes:,} of {len(ex):,}.")
    if world.same.within_rounding:
        few, total = world.same.within_rounding, world.same.total
        lines.append(f"Decided otherwise by the estimator, to within its rounding: {few:,} of {total:,}.")
    typical = float(np.median(ex.coverage))
    lines.append(f"Coverage {typical:.3g} (median share of the output that the columns carry; unit: {ex.unit}).")
    return lines


def plain(value: Any) -> float | None:
    """A number as JSON has it."""
    return float(value) if math.isfinite(value) else None


def _summary(ex: Explanation, portraits: list[Portrait], same: Decisions, left_out: int) -> dict[str, Any]:
    return _about(ex, portraits) | {
        "conservation": conservation(ex),
        "predictions_equal": same.equal,
        "decided_within_rounding": same.within_rounding,
        "left_out": left_out,
    }


def _about(ex: Explanation, portraits: list[Portrait]) -> dict[str, Any]:
    return {
        "version": 1,
        "model": ex.model,
        "kind": ex.kind,
        "rows": len(ex),
        "features": list(ex.feature_names),
        "question": ex.question,
        "output": ex.output_name,
        "rule": ex.rule,
        "beta": None if ex.beta is None else "inf" if math.isinf(ex.beta) else ex.beta,
        "unit": ex.unit,
        "coverage": plain(np.median(ex.coverage)),
        "notes": {name: int(flags.sum()) for name, flags in ex.notes.items()},
        "clusters": [_portrait(p) for p in portraits],
    }


def _portrait(p: Portrait) -> dict[str, Any]:
    return {
        "cluster": p.label,
        "contrast": p.contrast,
        "claim": p.claim,
        "rows": p.rows,
        "sentence": p.sentence,
        "coverage": plain(p.coverage),
        "median_output": plain(p.output),
        "features": [
            {
                "name": f.name,
                "mean_relevance": plain(f.relevance),
                "mean_value": plain(f.mean),
                "direction": f.direction,
                "break_even": plain(f.break_even),
                "category": f.category or None,
                "share": plain(f.share),
            }
            for f in p.features
        ],
    }


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make the folder, and say so where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"can not write into {folder}",
            expected="a folder where files can be written",
            got=error.strerror or str(error),
            fix="choose another with -o",
        ) from error


def write_json(summary: dict[str, Any], path: Path) -> None:
    """Atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _write_values(ex: Explanation, path: Path) -> None:
    """One line per row; of the largest values only, one line per value."""
    frame = _long(ex) if scipy.sparse.issparse(ex.values) else ex.to_frame(books=True)
    with replacing(path) as temporary:
        frame.to_csv(temporary, index_label="row")


def _long(ex: Explanation) -> pd.DataFrame:
    """One line per kept value, those of a row by magnitude, beside the books of the row."""
    import pandas as pd

    # books of as many rows without their columns
    books = replace(ex, values=np.empty((len(ex), 0)), feature_names=()).to_frame(books=True)
    kept = scipy.sparse.coo_array(ex.values)
    order = np.lexsort((-np.abs(kept.data), kept.row))
    row, column, value = kept.row[order], kept.col[order], kept.data[order]
    names = pd.Series(np.array(ex.feature_names, dtype=object)[column], dtype=object)
    long: pd.DataFrame = books.iloc[row].assign(feature=names.to_numpy(), relevance=value)
    return long


# ---------------------------------------------------------------------- describe


def saved(source: Source) -> Explanation | None:
    """The explanation in the file, where it is one of ours and no model was named."""
    path = Path(source.data)
    if path.suffix != ".npz" or any(s is not None for s in (source.model, source.pickle, source.fit)):
        return None
    if not path.is_file():
        raise DataError(f"{path} is not there", expected="explanations.npz", got="none", fix="check the path")
    return Explanation.load(path)


def describe_rows(source: Source, question: Question, row: int | None, most: int) -> Report:
    """Sentences about all rows, or the columns that speak most for and against one; nothing is written."""
    ex = saved(source)
    if ex is None:
        world = opened(source)
        if row is None:
            ex, _ = asked(world, question)
        else:
            # among others, so that a missing value is told from a column that never has any
            _place(row, len(world.frame))
            ex, kept = asked(world, question, np.union1d(np.arange(min(len(world.frame), _AMONG)), [row]))
            if row not in kept:
                rival = itself(world.net.kind, label_of(question.contrast, world.net))
                raise TargetError(
                    f"row {row} is {rival}", expected="another row", got=str(row), fix="give another --contrast"
                )
            place = int(np.searchsorted(kept, row))
    else:
        if question != Question():
            raise RuleError(f"{source.data} holds an answer already: drop the options that ask another question")
        if scipy.sparse.issparse(ex.values):
            raise DataError(
                f"{source.data} keeps the largest values of each row only, and sentences need all",
                expected="an explanation made without --top",
                got="a part of them",
                fix="describe the table itself, with its model, or explain again without --top",
            )
        place = 0 if row is None else _place(row, len(ex))
    if row is not None:
        return _one_row(ex, place, row, most)
    portraits = describe(ex)
    return Report([p.sentence for p in portraits], _about(ex, portraits))


def _one_row(ex: Explanation, place: int, row: int, most: int) -> Report:
    told = ex.for_and_against(place, most)

    def listed(reasons: tuple[Reason, ...]) -> list[dict[str, Any]]:
        return [
            {
                "name": r.name,
                "value": r.value,
                "break_even": plain(r.break_even),
                "side": r.side,
                "relevance": r.relevance,
            }
            for r in reasons
        ]

    summary = {
        "version": 1,
        "model": ex.model,
        "kind": ex.kind,
        "row": row,
        "question": told.question,
        "sentence": told.sentence,
        "output": told.output,
        "unit": told.unit,
        "for": listed(told.pro),
        "against": listed(told.con),
        "other_columns": told.others,
        "of_other_columns": told.rest,
        "residual": told.residual_parts,
        "notes": list(told.notes),
    }
    return Report(str(told).splitlines(), summary)


def _place(row: int, rows: int) -> int:
    if not 0 <= row < rows:
        raise DataError(f"there is no row {row}", expected=f"0 to {rows - 1}", got=str(row), fix="check --row")
    return row
