"""Command line: ``python -m neuralize``."""

from __future__ import annotations

import json as _json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from neuralize.audit import Decisions
    from neuralize.explanation import Explanation
    from neuralize.sentences import Portrait

__all__ = ["app", "main"]

# heavy imports belong into the commands: --help must answer at once

app = typer.Typer(
    help="Fitted clusterings as equivalent networks, explained exactly.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    """Fitted clusterings as equivalent networks, explained exactly."""


def _stop(message: str, code: int) -> typer.Exit:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(code)


def _label(text: str | None, labels: Any) -> Any:
    """A label as typed by the user, in the type of the labels."""
    if text is None:
        return None
    return next((label for label in labels.tolist() if str(label) == text), text)


@app.command()
def explain(
    data: Annotated[str, typer.Argument(help="csv, parquet or npz; or sklearn:wine, iris, breast_cancer, digits")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the results")],
    model: Annotated[Path | None, typer.Option(help="fitted estimator, a skops file")] = None,
    fit: Annotated[str | None, typer.Option(help="fit here instead: kmeans:K")] = None,
    scale: Annotated[bool, typer.Option("--scale", help="standardise the columns before fitting")] = False,
    target: Annotated[str | None, typer.Option(help="cluster to explain; default: each row's own")] = None,
    contrast: Annotated[str | None, typer.Option(help="the one competitor: why target rather than this")] = None,
    beta: Annotated[str, typer.Option(help="stiffness: auto, a number > 0, or inf")] = "auto",
    rule: Annotated[str, typer.Option(help="auto, divided, undivided, midpoint or shapley")] = "auto",
    header: Annotated[
        bool | None,
        typer.Option("--header/--no-header", help="whether a csv starts with column names", show_default=False),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="column to leave out; repeatable")] = None,
    columns: Annotated[str | None, typer.Option(help="columns to keep, separated by commas")] = None,
    seed: Annotated[int, typer.Option(help="seed of --fit", min=0, max=2**32 - 1)] = 0,
    device: Annotated[str | None, typer.Option(help="where to compute, such as cuda")] = None,
    json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Explain why each row is in its cluster, and what sets each cluster apart."""
    from lrp.errors import LRPError

    if (model is None) == (fit is None):
        raise _stop("give either --model FILE.skops or --fit kmeans:K", 2)
    if model is not None and scale:
        raise _stop("--scale belongs to --fit; a model brings its own scaling", 2)
    import warnings

    from neuralize.explanation import conserved
    from neuralize.sentences import describe

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # numpy and scikit-learn on numbers that are refused with an error anyway
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            frame = _frame(data, header, drop, columns)
            ex, same, left_out = _explanation(frame, model, fit, scale, seed, target, contrast, beta, rule, device)
        except LRPError as error:
            raise _stop(str(error), 2) from None
        gap = conserved(ex)
        if gap > 1e-9 or same.otherwise:
            raise _stop(
                f"contract broken: conservation to {gap:.2g} (1e-9 allowed), {same.otherwise} rows decided otherwise; "
                "nothing written",
                1,
            )
        portraits = describe(ex)
        summary = _summary(ex, portraits, gap, same, left_out)
        try:
            _write(ex, summary, output, Path(data).name)
        except OSError as error:
            raise _stop(f"can not write into {output}: {error.strerror or error}", 2) from None
    for text in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        print(f"warning: {' '.join(text.split())}", file=sys.stderr)
    if json:
        print(_json.dumps(summary, indent=2))
        return
    for portrait in portraits:
        print(portrait.sentence)
    if left_out:
        print(f"Left out: {left_out:,} row{'s' * (left_out != 1)} in cluster {contrast} itself.")
    if same.within_rounding:
        print(
            f"Decided otherwise by the estimator, to within its rounding: {same.within_rounding:,} of {same.total:,}."
        )
    print(f"Coverage {summary['coverage']:.3g} (median share of the output that the columns carry; unit: {ex.unit}).")
    print(f"Written to {output}: explanations.npz, values.csv, index.html, summary.json")


def _frame(data: str, header: bool | None, drop: list[str] | None, columns: str | None) -> pd.DataFrame:
    from neuralize.readers import read_frame

    return read_frame(data, header=header, drop=drop or (), columns=columns.split(",") if columns is not None else ())


def _explanation(
    frame: pd.DataFrame,
    model: Path | None,
    fit: str | None,
    scale: bool,
    seed: int,
    target: str | None,
    contrast: str | None,
    beta: str,
    rule: str,
    device: str | None,
) -> tuple[Explanation, Decisions, int]:
    """The explanation, how its network and the estimator agree, and the number of rows left out."""
    from lrp.errors import TargetError, UnverifiedError
    from neuralize import neuralize
    from neuralize.audit import decisions
    from neuralize.readers import read_estimator

    if fit is not None:
        fitted = _fit(fit, frame, scale, seed)
    else:
        assert model is not None
        fitted = read_estimator(model)
    net = neuralize(fitted)
    if net.feature_names is None:
        net.feature_names = tuple(frame.columns)
    stiffness: float | str = beta if beta == "auto" else _number(beta)
    wanted, rival = _label(target, net.labels), _label(contrast, net.labels)
    with _columns_advice(net.feature_names):
        own = net.predict(frame)
    if rule == "shapley":
        net.set_reference(frame)
    explained = frame
    # a row of the contrast cluster has no answer to "why its own rather than the contrast"
    if wanted is None and rival in net.labels.tolist():
        explained = frame[own != rival]
        if explained.empty:
            raise TargetError(
                f"every row is in cluster {rival} itself",
                expected="rows of other clusters",
                got="none",
                fix="give --target, or another --contrast",
            )
    ex = net.explain(explained, wanted, rival, stiffness, rule, device=device)
    try:
        same = decisions(net, fitted, frame)
    except UnverifiedError as error:
        raise _stop(str(error), 1) from None
    return ex, same, len(frame) - len(explained)


@contextmanager
def _columns_advice(names: tuple[str, ...]) -> Iterator[None]:
    """Say how to choose the columns here, not in Python."""
    import shlex

    from lrp.errors import ColumnError

    try:
        yield
    except ColumnError as error:
        told = "choose these columns in the table" if any("," in n for n in names) else ""
        fix = told or f"--columns {shlex.quote(','.join(names))}"
        raise ColumnError(error.what, expected=error.expected, got=error.got, fix=fix) from error


def _number(beta: str) -> float:
    from lrp.errors import RuleError

    try:
        return float(beta)
    except ValueError:
        raise RuleError(
            "--beta is no number", expected="auto, a number > 0 or inf", got=beta, fix="for example --beta 0.5"
        ) from None


def _fit(recipe: str, frame: Any, scale: bool, seed: int) -> Any:
    import numpy as np

    from lrp.errors import DataError
    from neuralize.readers import build, without

    estimator = build(recipe, scale=scale, seed=seed)
    numbers = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    if not np.isfinite(numbers).all():
        wrong = [c for c, bad in zip(frame.columns, ~np.isfinite(numbers).all(0), strict=True) if bad]
        raise DataError(
            f"columns with missing or infinite values: {', '.join(wrong)}",
            expected="a number in every cell",
            got=f"{int((~np.isfinite(numbers)).sum())} other cells",
            fix="impute them before, or leave the columns out: " + without(wrong),
        )
    with np.errstate(over="ignore"):
        overflow = not np.isfinite((numbers**2).sum())
    if overflow:
        raise DataError(
            "squares of the numbers overflow, so that no distance can be computed",
            expected="absolute values below 1e150",
            got=f"up to {np.abs(numbers).max():.3g}",
            fix="rescale the table",
        )
    distinct = len(np.unique(numbers, axis=0))
    wanted = int(recipe.partition(":")[2])
    if distinct < wanted:
        raise DataError(
            f"{wanted} clusters of {distinct} distinct rows",
            expected=f">= {wanted} distinct rows",
            got=str(distinct),
            fix="ask for fewer",
        )
    return estimator.fit(frame)


def _summary(ex: Explanation, portraits: list[Portrait], gap: float, same: Decisions, left_out: int) -> dict[str, Any]:
    import math

    import numpy as np

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "version": 1,
        "model": ex.model,
        "rows": len(ex),
        "features": list(ex.feature_names),
        "question": ex.question,
        "rule": ex.rule,
        "beta": None if ex.beta is None else "inf" if math.isinf(ex.beta) else ex.beta,
        "unit": ex.unit,
        "coverage": float(np.median(ex.coverage)),
        "conservation": gap,
        "predictions_equal": same.equal,
        "decided_within_rounding": same.within_rounding,
        "left_out": left_out,
        "clusters": [
            {
                "cluster": p.label,
                "contrast": p.contrast,
                "claim": p.claim,
                "rows": p.rows,
                "sentence": p.sentence,
                "coverage": p.coverage,
                "median_output": p.output,
                "features": [
                    {
                        "name": f.name,
                        "mean_relevance": f.relevance,
                        "mean_value": f.mean,
                        "direction": f.direction,
                        "break_even": plain(f.break_even),
                    }
                    for f in p.features
                ],
            }
            for p in portraits
        ],
    }


def _write(ex: Explanation, summary: dict[str, Any], folder: Path, name: str) -> None:
    from neuralize._files import replacing

    folder.mkdir(parents=True, exist_ok=True)
    ex.save(folder / "explanations.npz")
    with replacing(folder / "values.csv") as temporary:
        ex.to_frame(books=True).to_csv(temporary, index_label="row")
    own = bool((ex.target == ex.decided).all())
    ex.to_html(
        folder / "index.html", title=f"What sets the clusters of {name} apart" if own else f"{name}: {ex.question}"
    )
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(_json.dumps(summary, indent=2) + "\n", encoding="utf-8")


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
