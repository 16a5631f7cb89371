"""Commands that change rows: flipping columns away, and the nearest rows with another label."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lrp.errors import DataError, RuleError
from neuralize._commands import Opened, Question, Report, Source, asked, label_of, opened, plain, write_json, writing
from neuralize._files import replacing
from neuralize.counterfactuals import Counterfactuals, UnreachableError
from neuralize.evaluation import NearestMidpoint, OtherCluster, compare, gradient_x_input, srg
from neuralize.evaluation.plots import curves, gains
from neuralize.readers import read_matrix

if TYPE_CHECKING:
    import pandas as pd

    from neuralize.evaluation import FlippingCurve, Gain
    from neuralize.explanation import Explanation
    from neuralize.network import NeuralizedModel

__all__ = ["IMPUTERS", "Trial", "counterfactual", "flip"]

Floats = npt.NDArray[np.float64]

IMPUTERS = ("mean", "marginal", "other", "kde", "midpoint")
_SHOWN = 20


@dataclass(frozen=True)
class Trial:
    """How a flipping is run."""

    imputers: Sequence[str] = ()
    rows: int = 200
    draws: int = 20
    seeds: int = 3
    values: Path | None = None


# ---------------------------------------------------------------------- flip


@dataclass(frozen=True)
class _Judged:
    """What relevances are judged by: a score of rows X, and the rows that replace removed values."""

    score: Any
    X: pd.DataFrame
    reference: pd.DataFrame
    target: Any
    sign: str | None


def flip(source: Source, question: Question, trial: Trial, folder: Path) -> Report:
    """Judge the relevances of some rows by removing columns in their order."""
    world = opened(source)
    net = world.net
    encoded, kept = _complete(world)
    imputers = _imputers(world, trial.imputers)
    chosen = _sample(len(encoded), trial.rows, source.seed)
    given = None
    if trial.values is not None:
        given = read_matrix(trial.values, list(encoded.columns), len(world.frame))[kept][chosen]
    ex, _ = asked(world, question, np.flatnonzero(kept)[chosen])
    score, target = _score(net, ex)
    # regressions of both signs are explained with relevances of both
    judged = _Judged(score, encoded.iloc[chosen], encoded, target, "score" if net.kind == "value" else None)
    methods = {"relevance": ex.values, "gradient x input": gradient_x_input(score, judged.X, target=target)}
    if given is not None and trial.values is not None:
        methods[trial.values.name] = given
    table = _compared(methods, judged, imputers, trial, source.seed)
    name, imputer = next(iter(imputers.items()))
    drawn = {}
    for method in (m for m in methods if m != "gradient x input"):
        found = _gain(methods[method], judged, imputer, trial, source.seed)
        drawn[f"{method}: least relevant first"] = found.least
        drawn[f"{method}: most relevant first"] = found.most
    left_out = len(world.frame) - len(encoded)
    summary = _flip_summary(table, ex, trial, source, left_out)
    with writing(folder):
        with replacing(folder / "result.csv") as temporary:
            table.to_csv(temporary)
        write_json(summary, folder / "result.json")
        _picture(table, drawn, name, folder / "flip.png")
    lines = [*_flip_lines(table, left_out), f"Written to {folder}: result.json, result.csv, flip.png"]
    return Report(lines, summary)


def _complete(world: Opened) -> tuple[pd.DataFrame, npt.NDArray[np.bool_]]:
    """Rows without missing values as the network's numbers, and which they are, (N,)."""
    import pandas as pd

    schema = world.net.schema
    numbers = world.net.encode(world.frame)
    # columns that no step reads may hold anything
    numbers[:, ~np.array(schema.used)] = 0.0
    kept = np.asarray(np.isfinite(numbers).all(1))
    if kept.sum() < 2:
        raise DataError(
            "removed values are replaced by those of other rows, and there are none",
            expected="at least two rows without missing values",
            got=f"{int(kept.sum())} of {len(kept)}",
            fix="impute the table first, or leave out the columns with gaps",
        )
    return pd.DataFrame(numbers[kept], columns=list(schema.feature_names)), kept


def _sample(total: int, rows: int, seed: int) -> npt.NDArray[np.int64]:
    if rows >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, rows, replace=False))


def _forward(net: NeuralizedModel) -> Callable[[Any], Floats]:
    """Logits of encoded rows: a frame of codes must not be encoded again."""

    def logits(rows: Any) -> Floats:
        with torch.no_grad():
            return np.asarray(net(torch.tensor(np.asarray(rows, dtype=np.float64))).cpu().numpy())

    return logits


def _score(net: NeuralizedModel, ex: Explanation) -> tuple[Any, Any]:
    """What is tracked, and its target."""
    if len(net.labels) == 1:
        return (_forward(net), None) if any(net.schema.coded) else (net, None)
    if not any(net.schema.coded):
        return net, ex.target
    where = {label: i for i, label in enumerate(net.labels.tolist())}
    return _forward(net), np.array([where[t] for t in ex.target.tolist()])


def _imputers(world: Opened, names: Sequence[str]) -> dict[str, Any]:
    net = world.net
    coded = any(net.schema.coded)
    several = net.kind not in ("value", "density")
    usual = [*([] if coded else ["mean"]), "marginal", *(["other"] if several else [])]
    found: dict[str, Any] = {}
    for name in names or usual:
        if name not in IMPUTERS:
            raise RuleError("unknown imputer", expected=", ".join(IMPUTERS), got=name, fix="choose of these")
        if coded and name in ("mean", "kde", "midpoint"):
            raise RuleError(
                f"imputer {name} mixes values, and words can't be mixed",
                expected="marginal or other, which take whole values of other rows",
                got=f"columns of words: {', '.join(net.schema.categories)}",
                fix="--imputer marginal,other, or leave these columns out",
            )
        if name == "other" and not several:
            raise RuleError(
                "imputer other takes values of another cluster, and this model gives numbers",
                expected="mean, marginal or kde",
                got="other",
                fix="drop it from --imputer",
            )
        found[name] = name
        if name == "other" and coded:
            found[name] = OtherCluster(lambda rows: _positions(net, rows))
        if name == "midpoint":
            found[name] = NearestMidpoint(world.fitted)
    return found


def _positions(net: NeuralizedModel, rows: Any) -> npt.NDArray[np.int64]:
    """Which label encoded rows get."""
    with torch.no_grad():
        x = torch.tensor(np.asarray(rows, dtype=np.float64)).to(net.device, net.dtype)
        return np.asarray(net.head.assign(net.front(x))[0].cpu().numpy())


def _compared(
    methods: dict[str, Floats], judged: _Judged, imputers: dict[str, Any], trial: Trial, seed: int
) -> pd.DataFrame:
    import pandas as pd
    from tqdm import tqdm

    tables = []
    for name, imputer in tqdm(imputers.items(), disable=not sys.stderr.isatty(), leave=False, desc="imputers"):
        found = compare(
            methods,
            judged.score,
            judged.X,
            imputers={name: imputer},
            seeds=range(seed, seed + trial.seeds),
            draws=trial.draws,
            target=judged.target,
            reference=judged.reference,
            sign=judged.sign,
        )
        tables.append(found)
    return pd.concat(tables)


def _gain(values: Floats, judged: _Judged, imputer: Any, trial: Trial, seed: int) -> Gain:
    return srg(
        judged.score,
        judged.X,
        values,
        imputer=imputer,
        draws=trial.draws,
        seed=seed,
        target=judged.target,
        reference=judged.reference,
        sign=judged.sign,
    )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {"imputer": imputer, "method": method} | {str(k): plain(v) for k, v in row.items()}
        for (imputer, method), row in zip(table.index.tolist(), table.to_dict("records"), strict=True)
    ]


def _flip_lines(table: pd.DataFrame, left_out: int) -> list[str]:
    lines = [
        "Gain: area under the score when the least relevant columns go first, less that when the most relevant do,",
        "in units of the score before; 0 is a random order. Mean and standard error over the rows.",
    ]
    records = _records(table)
    wide = max(len(r["method"]) for r in records)
    for r in records:
        error = "" if r["srg_se"] is None else f" +- {r['srg_se']:.4f}"
        lines.append(f"  {r['imputer']:<9} {r['method']:<{wide}}  {r['srg']:8.4f}{error}")
    if left_out:
        lines.append(f"Left out: {left_out:,} row{'s' * (left_out != 1)} with missing values.")
    return lines


def _flip_summary(table: pd.DataFrame, ex: Explanation, trial: Trial, source: Source, left_out: int) -> dict[str, Any]:
    return {
        "version": 1,
        "model": ex.model,
        "kind": ex.kind,
        "fit": source.fit,
        "question": ex.question,
        "rule": ex.rule,
        "features": list(ex.feature_names),
        "rows": len(ex),
        "left_out": left_out,
        "draws": trial.draws,
        "seeds": list(range(source.seed, source.seed + trial.seeds)),
        "results": _records(table),
    }


def _picture(table: pd.DataFrame, drawn: dict[str, FlippingCurve], imputer: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it would look for a display
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    gains(table, left)
    curves(drawn, right)
    right.set_title(f"{imputer} imputer", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


# ---------------------------------------------------------------------- counterfactual


def counterfactual(source: Source, to: str | None, rows: slice, folder: Path | None, options: dict[str, Any]) -> Report:
    """The nearest rows with another label, of some rows of the table."""
    world = opened(source)
    net = world.net
    frame = world.frame.iloc[rows]
    if frame.empty:
        raise DataError(
            "no row is asked about", expected=f"rows of {len(world.frame)}", got="none", fix="check --row and --rows"
        )
    wanted = label_of(to, net)
    found, lost = _reached(net, frame, wanted, options | {"reference": world.frame})
    lines = [found.sentence(i) for i in range(min(len(found), _SHOWN))]
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN:,} more" + (f" in {folder}/counterfactuals.csv" if folder else ""))
    if lost:
        lines.append(
            f"Out of reach: {len(lost):,} of {len(frame):,} rows ({', '.join(lost[:8])}{' ...' * (len(lost) > 8)})."
        )
    if not found.exact.all():
        lines.append(f"Not proven nearest: {int((~found.exact).sum()):,} rows, where the budget ended the search.")
    lines.append(f"Distances: {found.metric}.")
    old, new = found.old.tolist(), found.new.tolist()
    index = [str(i) for i in (range(len(found)) if found.index is None else found.index)]
    summary = {
        "version": 1,
        "model": found.model,
        "kind": found.kind,
        "fit": source.fit,
        "metric": found.metric,
        "unit": found.unit,
        "unreachable": lost,
        "rows": [
            {
                "row": index[i],
                "old": old[i],
                "new": new[i],
                "distance": plain(found.distance[i]),
                "exact": bool(found.exact[i]),
                "sentence": found.sentence(i),
            }
            for i in range(len(found))
        ],
    }
    if folder is not None:
        with writing(folder):
            with replacing(folder / "counterfactuals.csv") as temporary:
                found.to_frame(books=True).to_csv(temporary, index_label="row")
            with replacing(folder / "changes.csv") as temporary:
                found.changes().to_csv(temporary, index=False)
            write_json(summary, folder / "summary.json")
        lines.append(f"Written to {folder}: counterfactuals.csv, changes.csv, summary.json")
    return Report(lines, summary)


def _reached(
    net: NeuralizedModel, frame: pd.DataFrame, wanted: Any, options: dict[str, Any]
) -> tuple[Counterfactuals, list[str]]:
    """Counterfactuals of the rows that have one, and labels of those that have none."""
    try:
        return net.counterfactual(frame, wanted, **options), []
    except UnreachableError as error:
        lost = np.array(error.rows, dtype=np.int64)
        if len(lost) >= len(frame):
            raise
        rest = np.setdiff1d(np.arange(len(frame)), lost)
        found, more = _reached(net, frame.iloc[rest], wanted, options)
        return found, [str(label) for label in frame.index[lost]] + more
