"""Pictures: what is drawn is what was given, zero is neutral, refusals teach."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

import lrp
from lrp import errors, plots

mpl.use("Agg")
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def ax() -> Any:
    return plt.subplots()[1]


@pytest.fixture(scope="module")
def rel() -> lrp.Relevance:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    return lrp.attribute(net, torch.rand(5, 3, 8, 8), wrt=("input", "channels"), composite="epsilon_plus")


def colour(ax: Any, value: float) -> np.ndarray:
    """The colour the picture gives a number."""
    image = ax.images[-1]
    return np.asarray(image.cmap(image.norm(value)))


def test_lazy() -> None:
    code = "import sys, lrp; lrp.plots; assert 'matplotlib' not in sys.modules; assert 'plots' in dir(lrp)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16", "list"])
def test_heatmap_sums_channels_and_is_symmetric(ax: Any, kind: str) -> None:
    r = torch.randint(-4, 5, (3, 5, 7)).float()
    given = {"numpy": r.numpy(), "torch": r.requires_grad_(), "bfloat16": r.bfloat16(), "list": r.tolist()}[kind]
    assert plots.heatmap(given, ax) is ax
    assert np.array_equal(ax.images[0].get_array(), r.sum(0).detach().numpy())
    low, high = ax.images[0].get_clim()
    assert low == -high < 0


@pytest.mark.parametrize("cmap", ["seismic", "RdBu_r", "bwr", "coolwarm"])
def test_zero_is_neutral(ax: Any, cmap: str) -> None:
    plots.heatmap([[1.0, -3.0], [0.0, 2.0]], ax, cmap=cmap)
    middle = np.asarray(mpl.colormaps[cmap](0.5))
    assert np.abs(colour(ax, 0.0) - middle).max() < 0.02
    red, blue = colour(ax, 1.0), colour(ax, -1.0)
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert np.allclose(colour(ax, 0.0)[0], colour(ax, 0.0)[2], atol=0.02)


@pytest.mark.parametrize("image", [None, torch.rand(4, 4)])
def test_zeros(ax: Any, image: Any) -> None:
    plots.heatmap(torch.zeros(3, 4, 4), ax, image=image, colorbar=True)
    assert ax.images[-1].get_clim() == (-1.0, 1.0)
    ax.figure.canvas.draw()


def test_limits(ax: Any) -> None:
    r = np.zeros((20, 20))
    r[0, 0] = -4.0  # the quantile of the magnitudes is 0: the largest takes over
    assert plots.heatmap(r, ax).images[-1].get_clim() == (-4.0, 4.0)
    assert plots.heatmap(r, ax, limit=0.5).images[-1].get_clim() == (-0.5, 0.5)
    r = np.linspace(-1, 1, 100).reshape(10, 10)
    assert plots.heatmap(r, ax, quantile=1.0).images[-1].get_clim() == (-1.0, 1.0)
    assert plots.heatmap(r, ax, quantile=0.5).images[-1].get_clim()[1] == pytest.approx(np.median(np.abs(r)))


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8), (8, 8, 3), (16, 16), (3, 16, 24)])
@pytest.mark.parametrize("scale", [1.0, 255.0, -2.0])
def test_overlay(ax: Any, shape: tuple[int, ...], scale: float) -> None:
    r = torch.randn(8, 8)
    r[0, 0] = 0
    plots.heatmap(r, ax, image=torch.rand(shape) * scale, title="$a$ and $b", colorbar=True)
    below, above = ax.images
    assert below.get_extent() == above.get_extent()
    assert above.get_alpha()[0, 0] == 0
    assert below.get_array().min() >= 0
    assert below.get_array().max() <= 1
    ax.figure.canvas.draw()


def test_grid(rel: lrp.Relevance) -> None:
    figure = plots.grid(rel.input, labels=list("abcde"), columns=3)
    assert [a.get_title() for a in figure.axes] == list("abcde")
    assert np.allclose(figure.axes[1].images[0].get_array(), rel.input[1].sum(0))
    figure = plots.grid(rel.input, images=torch.rand(5, 3, 8, 8), labels=list("abcde"), columns=3, limit=2.0)
    assert len(figure.axes) == 10
    assert {a.images[0].get_clim() for a in figure.axes} == {(0.0, 1.0), (-2.0, 2.0)}
    figure.canvas.draw()
    assert len(plots.grid(rel.input[:, 0]).axes) == 5


@pytest.mark.parametrize("channels", [1, 3])
def test_signal(ax: Any, channels: int) -> None:
    r, x = torch.randn(channels, 40), torch.randn(channels, 40)
    x[0] = 2.0  # a constant lane
    names = [f"lead {i}" for i in range(channels)]
    assert plots.signal(r, ax, values=x, names=names, title="beat") is ax
    assert np.allclose(ax.images[0].get_array(), r)
    lanes = [line for line in ax.lines if len(line.get_xdata()) == 40]
    assert len(lanes) == channels
    for c, line in enumerate(lanes):
        assert c - 0.5 < line.get_ydata().min() <= line.get_ydata().max() < c + 0.5
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert np.abs(colour(ax, 0.0)[:3] - 1).max() < 0.02


def test_channels(rel: lrp.Relevance, ax: Any) -> None:
    assert plots.channels(rel.channels["0"], ax) is ax
    mean = rel.channels["0"].double().mean(0).numpy()
    widths = [bar.get_width() for bar in ax.patches]
    assert np.allclose(sorted(widths, key=abs), sorted(mean, key=abs))
    assert abs(widths[-1]) == pytest.approx(np.abs(mean).max())
    other = plots.channels(rel.channels["0"][0], top=2, names=list("uvwxyz"), title="first")
    assert other is not ax
    assert len(other.patches) == 2
    assert "2 of 6" in other.get_xlabel()
    plots.channels(np.zeros(3)).figure.canvas.draw()


def test_ledger_bars_add_up(rel: lrp.Relevance, ax: Any) -> None:
    """All bars together, signs included, make the whole."""
    assert plots.ledger(rel.ledger, ax, title="books") is ax
    sign = torch.where(rel.ledger.start < 0, -1, 1)
    whole = float((rel.ledger.start * sign).sum() / rel.ledger.start.abs().sum())
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(whole, abs=1e-5)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names[0] == "input"
    assert names[1:] == [n for n in rel.ledger.modules if n in names]
    few = plots.ledger(rel.ledger, top=1)
    assert "other" in few.get_yticklabels()[-1].get_text()
    assert sum(bar.get_width() for bar in few.patches) == pytest.approx(whole, abs=1e-5)


def test_ledger_puts_small_modules_together() -> None:
    one = torch.ones(2, dtype=torch.float64)
    none = dict.fromkeys(("stabiliser", "dead", "constant", "nonlinear", "lost"), 0 * one)
    taken = {"a": 0.3, **{f"small {i}": 1e-5 for i in range(20)}, "b": 0.2, "nothing": 0.0}
    modules = {n: lrp.LedgerRow(start=one, input=one, bias=t * one, **none) for n, t in taken.items()}
    drawn = plots.ledger(lrp.Ledger(one, one - sum(taken.values()), modules))
    assert [t.get_text() for t in drawn.get_yticklabels()] == ["input", "a", "b", "20 others"]
    assert drawn.yaxis_inverted()
    assert sum(bar.get_width() for bar in drawn.patches) == pytest.approx(1)


def inside(text: Any, box: Any) -> bool:
    extent = text.get_window_extent()
    return bool(extent.x0 >= box.x0 - 1 and extent.x1 <= box.x1 + 1 and extent.y1 <= box.y1 + 1)


LONG = [
    "goldfish, Carassius auratus",
    "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias",
    "W" * 60,
    "",
    "cat\nor $dog$",
]


def test_labels_fit() -> None:
    figure = plots.grid(torch.randn(5, 8, 8), labels=LONG, columns=2)
    figure.canvas.draw()
    for a in figure.axes:
        assert inside(a.title, figure.bbox)
        middle, width = a.bbox.x0 + a.bbox.width / 2, a.title.get_window_extent().width
        assert width <= 1.45 * figure.dpi, "into the next title"
        assert abs(a.title.get_window_extent().x0 + width / 2 - middle) < 2
    assert figure.axes[0].get_title().replace("\n", " ") == LONG[0]
    assert figure.axes[1].get_title().endswith("…")
    assert figure.axes[4].get_title() == "cat\nor \\$dog\\$"


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (24, 8)])
@pytest.mark.parametrize("title", LONG[:3])
def test_titles_fit(shape: tuple[int, int], title: str) -> None:
    drawn = plots.heatmap(torch.randn(shape), title=title, colorbar=True)
    drawn.figure.canvas.draw()
    assert inside(drawn.title, drawn.figure.bbox)


@pytest.mark.parametrize("layout", [None, "constrained", "tight"])
@pytest.mark.parametrize("quantile", [1.0, 0.9])
def test_colour_bars_are_as_high_as_their_pictures(layout: str | None, quantile: float) -> None:
    shapes = [(8, 8), (8, 20), (20, 8)]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout=layout)
    for a, shape in zip(axes, shapes, strict=True):
        plots.heatmap(torch.randn(shape), a, title="a title", colorbar=True, quantile=quantile)
    figure.canvas.draw()
    for i, (a, bar) in enumerate(zip(axes, figure.axes[3:], strict=True)):
        full, picture = bar.get_tightbbox(), a.bbox
        assert bar.bbox.y0 >= picture.y0 - 1
        assert bar.bbox.y1 <= picture.y1 + 1
        assert bar.bbox.height > 0.85 * picture.height
        assert full.x0 > picture.x1
        if layout == "tight":  # which leaves room by guess
            continue
        assert full.x1 < (axes[i + 1].bbox.x0 if i < 2 else figure.bbox.x1)


WRONG: list[tuple[Any, type[errors.LRPError], str]] = [
    (lambda: plots.heatmap(torch.full((4, 4), torch.nan)), errors.NonFiniteError, "16 of 16"),
    (lambda: plots.heatmap(torch.zeros(2, 3, 4, 4)), errors.InputError, r"relevance\[i\].*grid"),
    (lambda: plots.heatmap(torch.zeros(4)), errors.InputError, "channels"),
    (lambda: plots.heatmap(torch.zeros(0, 4)), errors.InputError, "wrong shape"),
    (lambda: plots.heatmap("map"), errors.InputError, "no array"),
    (lambda: plots.heatmap((torch.zeros(1, 2, 2), torch.zeros(1, 2))), errors.InputError, "several inputs"),
    (lambda: plots.heatmap(torch.zeros(2, 2, dtype=torch.complex64)), errors.InputError, "complex"),
    (lambda: plots.heatmap(torch.zeros(2, 2), limit=0.0), errors.InputError, "limit"),
    (lambda: plots.heatmap(torch.zeros(2, 2), quantile=0.0), errors.InputError, "quantile"),
    (lambda: plots.heatmap(torch.zeros(8, 8), image=torch.zeros(5, 8, 8)), errors.InputError, "1 or 3"),
    (lambda: plots.grid(torch.zeros(2, 2)), errors.InputError, "heatmap"),
    (lambda: plots.grid(torch.zeros(2, 2, 2), images=torch.zeros(1, 2, 2)), errors.InputError, "2 images"),
    (lambda: plots.grid(torch.zeros(2, 2, 2), labels=["a"]), errors.InputError, "2 labels"),
    (lambda: plots.grid(torch.zeros(2, 2, 2), columns=0), errors.InputError, "columns"),
    (lambda: plots.signal(torch.zeros(2, 2, 2)), errors.InputError, "one sample"),
    (lambda: plots.signal(torch.zeros(2, 5), values=torch.zeros(2, 6)), errors.InputError, "does not fit"),
    (lambda: plots.signal(torch.zeros(2, 5), names=["a"]), errors.InputError, "2 names"),
    (lambda: plots.channels(torch.zeros(1, 2, 3, 3)), errors.InputError, "one layer"),
    (lambda: plots.channels({"conv": torch.zeros(3)}), errors.InputError, "one layer"),
    (lambda: plots.channels(torch.zeros(3), top=0), errors.InputError, "top"),
    (lambda: plots.channels(torch.zeros(3), names=["a"]), errors.InputError, "3 names"),
    (lambda: plots.ledger(None), errors.InputError, "ledger=True"),
    (lambda: plots.ledger({}), errors.InputError, "rel.ledger"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_refusals_teach(case: int) -> None:
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        call()
    assert not plt.get_fignums()  # nothing half drawn is left behind
