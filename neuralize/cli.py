"""Command line: ``python -m neuralize``."""

from __future__ import annotations

import json as _json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
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
    header: Annotated[bool, typer.Option("--header/--no-header", help="whether a csv starts with column names")] = True,
    drop: Annotated[list[str] | None, typer.Option(help="column to leave out; repeatable")] = None,
    columns: Annotated[str | None, typer.Option(help="columns to keep, separated by commas")] = None,
    seed: Annotated[int, typer.Option(help="seed of --fit")] = 0,
    device: Annotated[str | None, typer.Option(help="where to compute, such as cuda")] = None,
    json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
) -> None:
    """Explain why each row is in its cluster, and what sets each cluster apart."""
    from lrp.errors import LRPError

    if (model is None) == (fit is None):
        raise _stop("give either --model FILE.skops or --fit kmeans:K", 2)
    if model is not None and scale:
        raise _stop("--scale belongs to --fit; a model brings its own scaling", 2)
    import numpy as np

    from neuralize import neuralize
    from neuralize.explanation import conserved
    from neuralize.readers import read_estimator, read_frame
    from neuralize.sentences import describe

    try:
        frame = read_frame(data, header=header, drop=drop or (), columns=columns.split(",") if columns else ())
        if fit is not None:
            fitted = _fit(fit, frame, scale, seed)
        else:
            assert model is not None
            fitted = read_estimator(model)
        net = neuralize(fitted, reference=frame if rule == "shapley" else None)
        # estimators fitted on arrays have no column names; scikit-learn would only warn
        rows = frame if net.feature_names is not None else frame.to_numpy(dtype=np.float64)
        net_names = net.feature_names
        net.feature_names = tuple(frame.columns) if net_names is None else net_names
        stiffness: float | str = beta if beta == "auto" else _number(beta)
        ex = net.explain(
            frame, _label(target, net.labels), _label(contrast, net.labels), stiffness, rule, device=device
        )
        agree = net.predict(frame) == fitted.predict(rows)
    except LRPError as error:
        raise _stop(str(error), 2) from None
    except ValueError as error:
        # scikit-learn refuses double rows for centres fitted in single precision
        raise _stop(f"the estimator itself can not predict this table; nothing is verified: {error}", 1) from None
    gap = conserved(ex)
    # rows on a border to within rounding may fall on either side
    off = int(np.sum(~agree & (np.abs(ex.output) > 1e-9 * np.abs(ex.output).max(initial=0.0))))
    if gap > 1e-9 or off:
        raise _stop(
            f"contract broken: conservation to {gap:.2g} (1e-9 allowed), {off} rows decided otherwise; nothing written",
            1,
        )
    portraits = describe(ex)
    summary = _summary(ex, portraits, gap, int(agree.sum()))
    try:
        _write(ex, summary, output, Path(data).name)
    except OSError as error:
        raise _stop(f"can not write into {output}: {error.strerror or error}", 2) from None
    if json:
        print(_json.dumps(summary, indent=2))
        return
    for portrait in portraits:
        print(portrait.sentence)
    print(f"Coverage {summary['coverage']:.3g} (median share of the output that the columns carry; unit: {ex.unit}).")
    print(f"Written to {output}: explanations.npz, values.csv, index.html, summary.json")


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
    from neuralize.readers import build

    estimator = build(recipe, scale=scale, seed=seed)
    numbers = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    if not np.isfinite(numbers).all():
        wrong = [c for c, bad in zip(frame.columns, ~np.isfinite(numbers).all(0), strict=True) if bad]
        raise DataError(
            f"columns with missing or infinite values: {', '.join(wrong)}",
            expected="a number in every cell",
            got=f"{int((~np.isfinite(numbers)).sum())} other cells",
            fix="impute them before, or leave the columns out: " + " ".join(f"--drop {c}" for c in wrong),
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


def _summary(ex: Explanation, portraits: list[Portrait], gap: float, agree: int) -> dict[str, Any]:
    import math

    import numpy as np

    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "version": 1,
        "model": ex.model,
        "rows": len(ex),
        "features": list(ex.feature_names),
        "rule": ex.rule,
        "beta": None if ex.beta is None else "inf" if math.isinf(ex.beta) else ex.beta,
        "unit": ex.unit,
        "coverage": float(np.median(ex.coverage)),
        "conservation": gap,
        "predictions_equal": agree,
        "clusters": [
            {
                "cluster": p.label,
                "contrast": p.contrast,
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
    ex.to_html(folder / "index.html", title=f"What sets the clusters of {name} apart")
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
