"""What the commands do, apart from reading options and printing."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from lrp.errors import ColumnError, DataError, RuleError, TargetError, UnverifiedError
from neuralize._files import replacing
from neuralize.audit import Decisions, conservation, decisions
from neuralize.conversion import neuralize
from neuralize.explanation import ComputedLines, Explanation
from neuralize.readers import read_estimator, read_frame, read_labelled, read_pickle
from neuralize.recipes import fit
from neuralize.sentences import Portrait, describe

if TYPE_CHECKING:
    import pandas as pd

    from neuralize.network import NeuralizedModel

__all__ = ["Opened", "Question", "Report", "Source", "describe_rows", "explain", "named", "opened", "plain", "plural"]

_BLOCK = 2**14
_PLURALS = {"cluster": "clusters", "class": "classes", "outlier": "rows", "density": "rows", "value": "values"}


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


def named(kind: str, label: Any) -> str:
    """A label in words: cluster 2, class setosa, outliers."""
    if kind == "outlier" and label in (-1, 1):
        return "outliers" if label == -1 else "inliers"
    return f"{kind} {label}"


def plural(kind: str) -> str:
    """Of what the labels are."""
    return _PLURALS.get(kind, kind)


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


def asked(world: Opened, question: Question, frame: pd.DataFrame | None = None) -> tuple[Explanation, int]:
    """The explanation of some rows (all by default), and the number of rows left out.

    Rows of the contrast itself have no answer to "why its own rather than the
    contrast", and are left out.
    """
    net = world.net
    beta = _stiffness(question.beta)
    wanted, rival = label_of(question.target, net), label_of(question.contrast, net)
    if question.reference or question.rule == "shapley":
        net.set_reference(world.frame)
    _set_level(net, question.level, world.frame)
    own = world.own if frame is None else net.predict(frame)
    rows = frame = world.frame if frame is None else frame
    if wanted is None and rival in net.labels.tolist():
        rows = frame[own != rival]
        if rows.empty:
            raise TargetError(
                f"every row is in {named(net.kind, rival)} itself",
                expected="other rows",
                got="none",
                fix="give --target, or another --contrast",
            )
    ex = net.explain(rows, wanted, rival, beta, question.rule, question.output, top=question.top)
    gap = conservation(ex)
    if gap > 1e-9:
        raise UnverifiedError(f"contract broken: conservation to {gap:.2g} (1e-9 allowed); nothing written")
    return ex, len(frame) - len(rows)


def part(ex: Explanation, rows: Any, lines: bool = False) -> Explanation:
    """Some rows of an explanation; their lines only if asked for."""

    def taken(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: taken(v) for k, v in value.items()}
        return value[rows] if isinstance(value, np.ndarray) or scipy.sparse.issparse(value) else value

    held = {f.name: getattr(ex, f.name) for f in fields(ex)}
    kept = {"labels", "categories", "lines"}
    new = {name: taken(value) for name, value in held.items() if name not in kept}
    new["index"] = None if ex.index is None else ex.index[rows]
    some = replace(ex, **new, lines=None)
    if lines:
        some.__dict__["_computed"] = ComputedLines(ex.competitors[rows], ex.slope[rows], ex.break_even[rows])
    return some


# ---------------------------------------------------------------------- explain


def explain(source: Source, question: Question, folder: Path) -> Report:
    """Explain every row, and write what was found."""
    world = opened(source)
    ex, left_out = asked(world, question)
    portraits = describe(ex)
    summary = _summary(ex, portraits, world.same, left_out) | {"fit": source.fit}
    name = Path(source.data).name
    with writing(folder):
        ex.save(folder / "explanations.npz")
        write_values(ex, folder / "values.csv")
        ex.to_html(folder / "index.html", title=_title(ex, name))
        write_json(summary, folder / "summary.json")
    lines = [p.sentence for p in portraits] + _remarks(ex, world, question, left_out)
    lines.append(f"Written to {folder}: explanations.npz, values.csv, index.html, summary.json")
    return Report(lines, summary)


def _title(ex: Explanation, name: str) -> str:
    if ex.kind in ("cluster", "class") and bool((ex.target == ex.decided).all()):
        return f"What sets the {plural(ex.kind)} of {name} apart"
    return f"{name}: {ex.question}"


def _remarks(ex: Explanation, world: Opened, question: Question, left_out: int) -> list[str]:
    lines = []
    if left_out:
        rival = named(ex.kind, label_of(question.contrast, world.net))
        lines.append(f"Left out: {_rows(left_out)} in {rival} itself.")
    votes = int(np.sum(ex.notes["votes"])) if "votes" in ex.notes else 0
    if votes:
        lines.append(f"Decided by votes, without an outright winner: {votes:,} of {len(ex):,}.")
    if world.same.within_rounding:
        few, total = world.same.within_rounding, world.same.total
        lines.append(f"Decided otherwise by the estimator, to within its rounding: {few:,} of {total:,}.")
    typical = float(np.median(ex.coverage))
    lines.append(f"Coverage {typical:.3g} (median share of the output that the columns carry; unit: {ex.unit}).")
    return lines


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


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


def write_values(ex: Explanation, path: Path) -> None:
    """One line per row; of the largest values only, one line per value."""
    sparse = scipy.sparse.issparse(ex.values)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        for start in range(0, len(ex), _BLOCK):
            few = part(ex, slice(start, start + _BLOCK))
            frame = _long(few) if sparse else few.to_frame(books=True)
            frame.to_csv(file, index_label="row", header=start == 0)


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


def describe_rows(source: Source, question: Question, row: int | None) -> Report:
    """Sentences about all rows, or about one; nothing is written."""
    ex = saved(source)
    if ex is not None:
        if question != Question():
            raise RuleError(f"{source.data} holds an answer already: drop the options that ask another question")
        if scipy.sparse.issparse(ex.values):
            raise DataError(
                f"{source.data} keeps the largest values of each row only, and sentences need all",
                expected="an explanation made without --top",
                got=f"{ex.values.nnz:,} values",
                fix="describe the table itself, with its model, or explain again without --top",
            )
        if row is not None:
            ex = part(ex, [_place(row, len(ex))], lines=True)
    else:
        world = opened(source)
        only = None if row is None else world.frame.iloc[[_place(row, len(world.frame))]]
        ex, _ = asked(world, question, only)
    portraits = describe(ex)
    lines, summary = [p.sentence for p in portraits], _about(ex, portraits)
    if row is not None:
        speaking, against = for_and_against(ex, portraits[0])
        target = named(ex.kind, ex.target[0])
        for title, notes in ((f"For {target}:", speaking), (f"Against {target}:", against)):
            lines += [title, *(f"  {amount:+.4g}  {reason}" for amount, reason, _ in notes)] if notes else []
        parts = {name: float(p[0]) for name, p in ex.residual_parts.items() if p[0]}
        if parts:
            lines.append("Of no column: " + ", ".join(f"{name} {value:+.4g}" for name, value in parts.items()))
        lines.append(f"Together {ex.output[0]:.4g} ({ex.unit}).")
        summary |= {
            "row": row,
            "output_value": plain(ex.output[0]),
            "for": [{"name": name, "relevance": amount, "reason": reason} for amount, reason, name in speaking],
            "against": [{"name": name, "relevance": amount, "reason": reason} for amount, reason, name in against],
            "residual": parts,
        }
    return Report(lines, summary)


def _place(row: int, rows: int) -> int:
    if not 0 <= row < rows:
        raise DataError(f"there is no row {row}", expected=f"0 to {rows - 1}", got=str(row), fix="check --row")
    return row


def for_and_against(ex: Explanation, portrait: Portrait) -> tuple[list[tuple[float, str, str]], ...]:
    """Columns that speak for the target of a single row, and against it: relevance, reason, name; the largest first."""
    notes = [(float(f.relevance), f.reason, f.name) for f in portrait.features if f.relevance]
    notes.sort(key=lambda note: -abs(note[0]))
    return [n for n in notes if n[0] > 0], [n for n in notes if n[0] < 0]
