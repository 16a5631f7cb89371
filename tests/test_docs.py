"""The code of the documentation runs as it stands, page by page, and prints what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

PAGES = ["explain-a-network.md", "relevance-of-filters.md", "explain-a-table.md"]
DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str) -> None:
    mpl.use("Agg")
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "page"}
    # a block without a language right behind one of Python is what that prints
    blocks = list(re.finditer(r"^```python\n(.*?)^```$(?:\n\n^```\n(.*?)^```$)?", text, re.M | re.S))
    assert len(blocks) > 5
    try:
        for block in blocks:
            above = text[: block.start(1)].count("\n")  # so that errors name the line of the page
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile("\n" * above + block[1], str(DOCS / page), "exec"), names)
            if block[2] is not None:
                assert _lines(printed.getvalue()) == _lines(block[2])
    finally:
        plt.close("all")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", [*PAGES, "what-relevance-does-not-mean.md", "../README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = DOCS / page
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
