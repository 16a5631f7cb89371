"""The README's question on real customers: ``python -m experiments.customers -o docs``.

"Why is this customer in this group, and not in that one?" The wholesale
customers of UCI (440 rows: yearly spending on six kinds of goods in monetary
units, m.u.; channel and region are left out), through log(1 + x),
StandardScaler and KMeans, K = 3, ``n_init=20``, ``random_state=0``. Of K from 2
to 7 the mean silhouette is largest at 2 and next at 3; 3 is taken, so that
there is a group that the question is not about.

``customers.png``: what sets every group apart, and one customer in the contrast
of its group with another: the one of group 1 that is nearest to the border with
group 2. The script also prints what the picture shows, in words.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from experiments import data as sets
from lrp.errors import DataError
from neuralize import NeuralizedModel, describe, neuralize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neuralize import Explanation

TABLE = "tabular/wholesale_customers.csv"
GROUP, RIVAL = 1, 2
DPI = 150


def table(data: Path) -> pd.DataFrame:
    """Spending (440, 6) in m.u.

    Raises
    ------
    DataError
        If the table is missing.
    """
    path = data / TABLE
    if not path.is_file():
        raise DataError(
            "the table of wholesale customers is missing",
            expected=f"{TABLE} in the data folder: UCI, 440 rows, with a header",
            got=f"nothing at {path}",
            fix="pass --data DIR or set NEURALIZE_DATA",
        )
    return pd.read_csv(path).drop(columns=["Channel", "Region"])


def fit(X: pd.DataFrame) -> Pipeline:
    """The clustering that is asked about."""
    logarithm = FunctionTransformer(np.log1p, feature_names_out="one-to-one")
    return make_pipeline(logarithm, StandardScaler(), KMeans(3, n_init=20, random_state=0)).fit(X)


def nearest_to_border(net: NeuralizedModel, X: pd.DataFrame) -> int:
    """Position of the row of the group that is nearest to the border with its rival."""
    mine = np.flatnonzero(net.predict(X) == GROUP)
    return int(mine[net.explain(X.iloc[mine], contrast=RIVAL).output.argmin()])


def groups(ex: Explanation, X: pd.DataFrame, ax: Axes) -> None:
    """Groups x columns: relevance as colour, the group's median spending as number."""
    ex.plot.heatmap(ax=ax)
    medians, means = X.groupby(ex.target).median(), ex.by_cluster()["mean"]
    share = means.div(means.abs().max(axis=1), axis=0).to_numpy()
    for (i, t), value in np.ndenumerate(medians.to_numpy()):
        ax.text(t, i, f"{value:,.0f}", ha="center", va="center", color="white" if abs(share[i, t]) > 0.6 else "0.15")
    sizes = pd.Series(ex.target).value_counts()
    ax.set_yticks(range(len(means)), [f"group {k}\n{sizes[k]} customers" for k in means.index])
    names = [name.replace("_", "\n") for name in X.columns]
    ax.set_xticks(range(X.shape[1]), names, rotation=0, ha="center", rotation_mode="default", fontsize=9)
    ax.tick_params(length=0)
    bar = ax.images[0].colorbar
    assert bar is not None
    bar.remove()  # the heading says it, and the cells need the room


def customer(ex: Explanation, ax: Axes) -> None:
    """One customer in the contrast: bars, each with its value and its break-even value."""
    ex.plot.bar(0, ax=ax)
    told = ex.for_and_against(0, top=ex.values.shape[1])
    reasons = sorted([*told.pro, *told.con], key=lambda r: abs(r.relevance))
    names = [f"{r.name.replace('_', ' ')}  {r.value:,.0f}" for r in reasons]
    ax.set_yticks(range(len(reasons)), names)
    reach = max(abs(r.relevance) for r in reasons)
    ax.set_xlim(-1.35 * reach, 1.35 * reach)
    for y, r in enumerate(reasons):
        # the break-even value on the free side of the bar, the relevance at its end
        free = 1 if r.relevance < 0 else -1
        _beside(ax, f"break-even {r.break_even:,.0f}", (0, y), free, 9.5, "black")
        _beside(ax, f"{r.relevance:+.2f}", (r.relevance, y), -free, 9.5, "0.35")
    ax.set_title("")  # the panel has a heading
    ax.set_xticks([])
    ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(f"red: for group {GROUP}, blue: against it; sum {told.output:+.2f}, border 0", fontsize=9.5)


def _beside(ax: Axes, text: str, point: tuple[float, float], side: int, size: float, color: str) -> None:
    """A text to the right (1) or left (-1) of a point."""
    ax.annotate(
        text,
        point,
        xytext=(4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=size,
        color=color,
    )


def draw(net: NeuralizedModel, X: pd.DataFrame, i: int, path: Path) -> None:
    """Both panels, each with a question and how to read it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: Any = plt.figure(figsize=(11.5, 4), layout="constrained").subfigures(1, 2, wspace=0.04)
    groups(net.explain(X), X, panels[0].subplots())
    customer(net.explain(X.iloc[[i]], contrast=RIVAL), panels[1].subplots())
    heads = (
        ("What sets each group apart?", "number: median spending, monetary units; darker: speaks more for the group"),
        (
            f"Why is customer {X.index[i]} in group {GROUP}, and not in group {RIVAL}?",
            "spending and break-even value (relevance 0), monetary units; bar: relevance",
        ),
    )
    for panel, (question, reading) in zip(panels, heads, strict=True):
        panel.suptitle(f"{question}\n", fontsize=12, fontweight="bold")
        panel.text(0.5, 0.895, reading, ha="center", va="bottom", fontsize=9.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    panels[0].figure.savefig(path, dpi=DPI)
    plt.close("all")


def main() -> None:
    """Write the picture, and print its content."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of real data")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    try:
        X = table(sets.folder(arguments.data))
    except DataError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    net = neuralize(fit(X))
    i = nearest_to_border(net, X)
    path = arguments.output / "customers.png"
    draw(net, X, i, path)
    for portrait in describe(net.explain(X)):
        print(portrait.sentence)
    print(f"\n{net.explain(X.iloc[[i]], contrast=RIVAL).for_and_against(0)}\nwrote {path}")


if __name__ == "__main__":
    main()
