"""Command line: ``python -m neuralize``."""

from __future__ import annotations

import json as _json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from neuralize._commands import Report, Source

__all__ = ["app", "main"]

# heavy imports belong into the commands: --help must answer at once

app = typer.Typer(
    help="Fitted clusterings, SVMs, mixtures and densities as equivalent networks, explained exactly.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_FITS = (
    "kmeans:K, minibatch:K, bisecting:K, gmm:K[:covariance], birch:K, meanshift, kernel-kmeans:K[:gamma], "
    "one-class-svm[:nu], kde[:bandwidth]; with --target-column: svc, knn:K, logistic, lda, qda, nb"
)

Data = Annotated[
    str, typer.Argument(metavar="DATA", help="csv, parquet or npz; or sklearn:wine, iris, breast_cancer, digits")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder for the results")]
Model = Annotated[Path | None, typer.Option(metavar="FILE", help="fitted estimator or pipeline, a skops file")]
Pickle = Annotated[
    Path | None,
    typer.Option(
        "--allow-pickle",
        metavar="FILE",
        help="the same from a pickle or joblib file, whose code is run: only if you trust it",
    ),
]
Fit = Annotated[str | None, typer.Option(metavar="RECIPE", help=f"fit here instead: {_FITS}")]
Scale = Annotated[bool, typer.Option("--scale", help="standardise before fitting; prepare words and gaps as --prepare")]
Prepare = Annotated[
    bool, typer.Option("--prepare", help="before fitting impute gaps, encode words one-hot, standardise numbers")
]
LabelColumn = Annotated[
    str | None, typer.Option("--target-column", metavar="NAME", help="column of labels, for recipes with classes")
]
Target = Annotated[str | None, typer.Option(metavar="LABEL", help="label to explain; default: each row's own")]
Contrast = Annotated[str | None, typer.Option(metavar="LABEL", help="the one competitor: why target rather than this")]
Beta = Annotated[str, typer.Option(metavar="B", help="stiffness: auto, a number > 0, or inf")]
Rule = Annotated[
    str,
    typer.Option(metavar="RULE", help="auto, divided, undivided, midpoint, gi, hybrid or shapley, as the model has it"),
]
Kind = Annotated[
    str, typer.Option("--output-kind", metavar="KIND", help="logit, or decision: the estimator's own decision value")
]
Reference = Annotated[
    bool, typer.Option("--reference", help="measure from the table: its mean, and the mean output of its rows")
]
Level = Annotated[str | None, typer.Option(metavar="Y", help="of a regression: the value to compare with, or mean")]
Header = Annotated[
    bool | None,
    typer.Option("--header/--no-header", help="whether a csv starts with column names", show_default=False),
]
Drop = Annotated[list[str] | None, typer.Option(metavar="NAME", help="column to leave out; repeatable")]
Columns = Annotated[str | None, typer.Option(metavar="NAMES", help="columns to keep, separated by commas")]
Seed = Annotated[int, typer.Option(help="seed of all that is random", min=0, max=2**32 - 1)]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="where to compute, such as cuda")]
Json = Annotated[bool, typer.Option("--json", help="print a summary as JSON, and nothing else")]


@app.callback()
def _root() -> None:
    """Fitted clusterings, SVMs, mixtures and densities as equivalent networks, explained exactly."""


def _stop(message: str, code: int) -> typer.Exit:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(code)


_OPTION = re.compile(r"\b(target|contrast|beta|rule|output|device|fixed|change|integers|bounds|top)=('?)([^\s',;)]*)\2")


_CALLS = {
    "neuralize(fitted, reference=X)": "--reference",
    "explain(..., contrast=...)": "the command explain with --contrast",
    "net.set_level(value)": "--level",
}


def _for_the_shell(text: str) -> str:
    """Keyword arguments in advice, as options."""

    def option(match: re.Match[str]) -> str:
        name = "output-kind" if match[1] == "output" else match[1]
        return f"--{name}" + (f" {match[3]}" if match[3] else "")

    for python, shell in _CALLS.items():
        text = text.replace(python, shell)
    return _OPTION.sub(option, text)


def _run(work: Callable[[], Report], json: bool) -> None:
    """Do the work, and print what it reports; every error is one line."""
    from lrp.errors import LRPError, UnverifiedError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # numpy and scikit-learn on numbers that are refused with an error anyway
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            report = work()
        except LRPError as error:
            told = LRPError(
                error.what, expected=_for_the_shell(error.expected), got=error.got, fix=_for_the_shell(error.fix)
            )
            raise _stop(str(told), 1 if isinstance(error, UnverifiedError) else 2) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _stop(f"{where}{error.strerror or error}", 2) from None
    for text in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        print(f"warning: {_for_the_shell(' '.join(text.split()))}", file=sys.stderr)
    if json:
        print(_json.dumps(report.summary, indent=2))
        return
    for line in report.lines:
        print(line)


def _source(
    data: str,
    model: Path | None,
    pickle: Path | None,
    fit: str | None,
    prepare: bool,
    label: str | None,
    header: bool | None,
    drop: list[str] | None,
    columns: str | None,
    seed: int,
    device: str | None,
) -> Source:
    from neuralize._commands import Source

    kept = columns.split(",") if columns is not None else ()
    return Source(data, model, pickle, fit, prepare, label, header, drop or (), kept, seed, device)


@app.command()
def explain(
    data: Data,
    output: Output,
    model: Model = None,
    allow_pickle: Pickle = None,
    fit: Fit = None,
    scale: Scale = False,
    prepare: Prepare = False,
    target_column: LabelColumn = None,
    target: Target = None,
    contrast: Contrast = None,
    beta: Beta = "auto",
    rule: Rule = "auto",
    output_kind: Kind = "logit",
    level: Level = None,
    reference: Reference = False,
    top: Annotated[int | None, typer.Option(help="keep the largest values of each row only", min=1)] = None,
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="let the reader of the page choose other labels, too")
    ] = False,
    header: Header = None,
    drop: Drop = None,
    columns: Columns = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Explain why each row is labelled as it is, and what sets each cluster or class apart."""

    def work() -> Report:
        from neuralize._commands import Question, explain

        source = _source(
            data, model, allow_pickle, fit, scale or prepare, target_column, header, drop, columns, seed, device
        )
        return explain(
            source, Question(target, contrast, beta, rule, output_kind, level, reference, top), output, alternatives
        )

    _run(work, json)


@app.command()
def describe(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="a table as for explain, or an explanations.npz that explain has written"),
    ],
    model: Model = None,
    allow_pickle: Pickle = None,
    fit: Fit = None,
    scale: Scale = False,
    prepare: Prepare = False,
    target_column: LabelColumn = None,
    row: Annotated[int | None, typer.Option(help="one row only, from 0: what speaks for and against it", min=0)] = None,
    top: Annotated[int, typer.Option(help="of one row: columns on either list", min=1)] = 5,
    target: Target = None,
    contrast: Contrast = None,
    beta: Beta = "auto",
    rule: Rule = "auto",
    output_kind: Kind = "logit",
    level: Level = None,
    reference: Reference = False,
    header: Header = None,
    drop: Drop = None,
    columns: Columns = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Say in a sentence what sets each cluster or class apart; nothing is written."""

    def work() -> Report:
        from neuralize._commands import Question, describe_rows

        source = _source(
            data, model, allow_pickle, fit, scale or prepare, target_column, header, drop, columns, seed, device
        )
        return describe_rows(source, Question(target, contrast, beta, rule, output_kind, level, reference), row, top)

    _run(work, json)


@app.command()
def flip(
    data: Data,
    output: Output,
    model: Model = None,
    allow_pickle: Pickle = None,
    fit: Fit = None,
    scale: Scale = False,
    prepare: Prepare = False,
    target_column: LabelColumn = None,
    imputer: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="what replaces removed values: some of mean,marginal,other,kde,midpoint; default: what fits",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="number of rows that are judged, drawn from the table", min=1)] = 200,
    draws: Annotated[int, typer.Option(help="of random imputers", min=1)] = 20,
    seeds: Annotated[int, typer.Option(help="repetitions, from --seed on", min=1)] = 3,
    values: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="judge another tool's relevances as well: an npz or csv of all rows"),
    ] = None,
    target: Target = None,
    beta: Beta = "auto",
    rule: Rule = "auto",
    reference: Reference = False,
    header: Header = None,
    drop: Drop = None,
    columns: Columns = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """Judge relevances by removing columns in their order, beside random ones, slopes and slopes times input."""

    def work() -> Report:
        from neuralize._commands import Question
        from neuralize._whatif import Trial, flip

        source = _source(
            data, model, allow_pickle, fit, scale or prepare, target_column, header, drop, columns, seed, device
        )
        names = tuple(n.strip() for n in imputer.split(",")) if imputer is not None else ()
        return flip(
            source,
            Question(target, None, beta, rule, reference=reference),
            Trial(names, rows, draws, seeds, values),
            output,
        )

    _run(work, json)


@app.command()
def counterfactual(
    data: Data,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder for the results; else only printed")
    ] = None,
    model: Model = None,
    allow_pickle: Pickle = None,
    fit: Fit = None,
    scale: Scale = False,
    prepare: Prepare = False,
    target_column: LabelColumn = None,
    to: Annotated[str | None, typer.Option(metavar="LABEL", help="label to reach; default: any other")] = None,
    row: Annotated[int | None, typer.Option(help="one row, from 0", min=0)] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="A:B", help="rows A to B, from 0, without B itself; default: all")
    ] = None,
    fixed: Annotated[list[str] | None, typer.Option(metavar="NAME", help="column that must stay; repeatable")] = None,
    change: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="column of words that may change; repeatable")
    ] = None,
    integers: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="column that stays whole; repeatable")
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="distances: scaled by the table's deviations, or raw")
    ] = "scaled",
    bounds: Annotated[str, typer.Option(metavar="NAME", help="data: stay within the table's range; or none")] = "none",
    header: Header = None,
    drop: Drop = None,
    columns: Columns = None,
    seed: Seed = 0,
    device: Device = None,
    json: Json = False,
) -> None:
    """The smallest change of a row that gives it another label."""

    def work() -> Report:
        from neuralize._whatif import counterfactual

        source = _source(
            data, model, allow_pickle, fit, scale or prepare, target_column, header, drop, columns, seed, device
        )
        options: dict[str, Any] = {
            "fixed": fixed or (),
            "change": change or (),
            "integers": integers or (),
            "metric": metric,
            "bounds": None if bounds == "none" else bounds,
        }
        return counterfactual(source, to, _rows(row, rows), output, options)

    _run(work, json)


def _rows(row: int | None, rows: str | None) -> slice:
    from lrp.errors import RuleError

    if row is not None and rows is not None:
        raise RuleError("give --row or --rows, not both")
    if row is not None:
        return slice(row, row + 1)
    found = re.fullmatch(r"(\d*):(\d*)", rows or ":")
    if found is None:
        raise RuleError("--rows is no range", expected="FROM:TO", got=rows or "", fix="for example --rows 0:20")
    first, last = found.groups()
    return slice(int(first) if first else None, int(last) if last else None)


def main() -> None:
    """Entry point."""
    try:
        code = app(prog_name="python -m neuralize", standalone_mode=False)
    except Exception as error:
        # wrong use, as the parser reports it; anything else is ours and shows its traceback
        code = getattr(error, "exit_code", None)
        describe = getattr(error, "format_message", None)
        if code is None:
            raise
        if describe is not None and describe():
            print(f"error: {' '.join(describe().split())}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
