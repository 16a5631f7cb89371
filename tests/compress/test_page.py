"""The page: what it says, what it survives, and what a browser makes of it at phone and desktop width."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reports import AFTER, BEFORE, answers, by_hand, compared

from compress import Target
from compress.comparison import Comparison, Curve
from compress.drift import Agreement, Drift, SampleDrift
from compress.page import render, render_study
from compress.pruning import Step
from compress.reporting import Measured, Report
from compress.sensitivity import Row, Sensitivity

HOSTILE = "</style></script><script>alert('x')</script><!-- &\"$a_b$"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = ("meta", "br", "path", "use", "image")


class Page(html.parser.HTMLParser):
    """Tags, links to anything outside, the visible text, the cells of all tables, names of parts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "xlink:href")]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip("\n")


def comparison(names: tuple[str, ...] = ("lrp", "random", "weight", "activation")) -> Comparison:
    curves = []
    for k, name in enumerate(names):
        for batchnorm in (False, True):
            draws = tuple(tuple(0.95 - 0.1 * k * r + 0.01 * d for r in (1, 2, 3)) for d in range(3))
            curves.append(Curve(name, "none", batchnorm, draws, (0.3, 0.5, 0.6)))
    return Comparison((0.3, 0.5, 0.6), "macs", tuple(curves), 0.99, (0.99,), 347)


def sensitivity(names: tuple[str, ...] = ("conv1", "conv2", "layer1.0.conv1")) -> Sensitivity:
    rows = tuple(Row(n, (n,), 32, (0.98, 0.9 - 0.1 * k), (3, 16)) for k, n in enumerate(names))
    return Sensitivity((0.1, 0.5), rows, 0.99, 347)


def drift() -> Drift:
    rows = tuple(SampleDrift(i, 0, 0, 0, i % 5 == 0, 1 - 0.05 * i, 0.9, 0.8) for i in range(12))
    return Drift(rows, {"cosine": Agreement(0.7, 0.6, 0.8, 12, 0.4)})


def rich() -> Report:
    """A report with everything in it."""
    steps = tuple(
        Step(k, Target(macs=100_000 * (4 - k)), dataclasses.replace(AFTER, macs=100_000 * (4 - k)), answers({0: 5 * k}),
             answers({0: k}), None, 1.5)
        for k in (1, 2)
    )  # fmt: skip
    rivals = {
        name: {"reached": AFTER.to_json(), "evaluation": {"accuracy": accuracy, "count": 450}, "stopped": ""}
        for name, accuracy in (("random", 0.9), ("weight", 0.99))
    }
    settings = {
        "criterion": {"name": "lrp:epsilon_plus", "composite": "epsilon_plus"},
        "ranking": {"normalisation": "none", "scope": "global", "floor": {"conv1": 0.5}},
        "reestimate_batchnorm": True,
        "samples": 100,
        "seed": 7,
    }
    sections = {
        "comparison": comparison().to_json(),
        "rivals": rivals,
        "sensitivity": sensitivity().to_json(),
        "drift": drift().to_json(),
    }
    return by_hand(history=steps, settings=settings, sections=sections, unscored={"gate": "no relevance by rule"})


# ---------------------------------------------------------------------- without a browser


def test_page() -> None:
    report = rich()
    source = render(report)
    page = Page(source)
    assert not page.open
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    for outside in ("@import", "http:", "https:", "<script"):
        assert outside not in source
    assert not re.search(r"url\((?!#)", source)
    assert "default-src 'none'" in source
    assert "width=device-width" in source
    assert "prefers-color-scheme: dark" in source
    assert len(page.ids) == len(set(page.ids))  # parts of drawings have names of their own
    for sentence in report.sentences:
        assert sentence in page.text
    costs, classes, rivals, widths, steps = page.tables
    assert ["MACs", "400,000", "196,000", "49 %", ""] in costs
    assert ["latency, ms", "1", "0.6", "60 %", ""] in costs
    assert ["8", "45", "100 %", "93.3 %", "3", "0", "1", ""] in classes
    assert classes[-1][:4] == ["all", "450", "99.6 %", "98.7 %"]
    assert [row[0] for row in rivals[1:]] == ["weight", "lrp:epsilon_plus (this run)", "random"]
    assert ["conv2", "32", "24", "75 %", ""] in widths
    assert steps[2] == ["1", "300,000", "18,000", "98.9 %", "99.8 %", "1.5"]
    for text in (
        "Seed",
        "7",
        "no relevance by rule",
        "its channels are the network's output",
        "2.13.0",
        "epsilon_plus",
    ):
        assert text in page.text
    assert page.tags.count("svg") == 4


def test_what_was_not_measured_leaves_no_hole() -> None:
    bare = by_hand()
    bare = dataclasses.replace(
        bare, before=Measured(BEFORE), after=Measured(AFTER), classes=compared(None, None), history=(), filters={},
        settings={}, versions={}, protected={}, widths={},
    )  # fmt: skip
    page = Page(render(bare))
    assert not page.open
    assert "Who was hurt" not in page.text
    assert "Steps" not in page.text
    assert "None" not in page.text


def test_names_are_only_text() -> None:
    report = rich()
    report = dataclasses.replace(
        report,
        title=HOSTILE,
        model="<b>Net</b>",
        widths={HOSTILE: (4, 2), "<i>conv</i>": (3, 1)},
        protected={"<u>x</u>": HOSTILE},
        notes=("<em>mind</em>",),
        sections={
            "sensitivity": sensitivity((HOSTILE, "<s>a</s>")).to_json(),
            "comparison": comparison(("<q>lrp</q>", "random", "weight", "activation")).to_json(),
        },
        settings={"criterion": {"name": HOSTILE}, "<kbd>": "\ud800"},
    )
    source = render(report)
    page = Page(source)
    assert not page.open
    assert not {"script", "u", "em", "s", "q", "kbd"} & set(page.tags)
    for text in (HOSTILE, "<b>Net</b>", "<i>conv</i>", "<u>x</u>", "<em>mind</em>"):
        assert text in page.text


def test_a_study_alone() -> None:
    page = Page(render_study("nets:build: sensitivity", {"sensitivity": sensitivity().to_json()}))
    assert not page.open
    assert "What each group can lose alone" in page.text
    assert "baseline 0.9900" in page.text
    assert page.tags.count("svg") == 1
    curves = Page(render_study("c", {"comparison": comparison().to_json()}))
    assert "better than the best baseline" in curves.text


def test_one_rate_makes_no_curve() -> None:
    one = Comparison((0.5,), "macs", (Curve("lrp", "none", True, ((0.9,),), (0.5,)),
                     Curve("random", "none", True, ((0.8,),), (0.5,))), 0.99)  # fmt: skip
    page = Page(render_study("c", {"comparison": one.to_json()}))
    assert "svg" not in page.tags
    assert "0.9000" in page.text


def test_the_page_does_not_change_between_calls() -> None:
    assert render(rich()) == render(rich())


def test_many_layers_and_classes() -> None:
    many = answers({c: c % 3 for c in range(1000)}, per_class=4, classes=1000)
    report = by_hand(before=answers({}, per_class=4, classes=1000), after=many)
    report = dataclasses.replace(
        report, widths={f"stage{k // 50}.block{k}.conv": (64, 64 - k % 60) for k in range(300)}
    )
    source = render(report)
    page = Page(source)
    assert "900 more classes with smaller losses" in page.text
    assert len(page.tables[1]) == 102
    assert len(page.tables[2]) == 301
    assert len(source) < 250_000


# ---------------------------------------------------------------------- in a browser

browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--virtual-time-budget=4000",
]


def opened(page: Path, *options: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, *QUIET, f"--user-data-dir={page.parent}/profile", *options]
    done = subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    return done.stdout.decode()


def framed(page: Path, width: int, height: int) -> Path:
    """Headless windows are no narrower than 500 pixels; frames are."""
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(
        "<body style='margin:0'><script>onmessage = (e) => { document.title = JSON.stringify(e.data); }</script>"
        f'<iframe src="{page.as_uri()}" style="width:{width}px;height:{height}px;border:0"></iframe>'
    )
    return frame


def worst() -> Report:
    """Names and numbers that take all the room there is."""
    report = rich()
    long = {
        f"features.denseblock{k}.denselayer{k}.conv_with_a_very_long_name_{'x' * 60}": (2048, 1999) for k in range(4)
    }
    names = ("y" * 70, *long)
    return dataclasses.replace(
        report,
        title="An extraordinarily long title " * 4 + "z" * 90,
        widths={**long, **report.widths},
        protected=dict.fromkeys(long, "because " * 30),
        before=dataclasses.replace(report.before, costs=dataclasses.replace(BEFORE, macs=123_456_789_012)),
        sections={**report.sections, "sensitivity": sensitivity(names).to_json()},
        settings={**report.settings, "a setting": {"deep": ["x" * 300]}},
    )


@browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["rich", "worst"])
def test_nothing_runs_over_the_edge(width: int, which: str, tmp_path: Path) -> None:
    measure = """
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    const main = document.querySelector("main").getBoundingClientRect();
    const over = [...document.querySelectorAll("section > *, figure > svg, li, dd")].filter(
      (e) => e.getBoundingClientRect().right > main.right + 1);
    const small = [...document.querySelectorAll("svg text")].map((e) => e.getBoundingClientRect().height)
      .filter((h) => h > 0);
    parent.postMessage([innerWidth, document.documentElement.scrollWidth, over.length, Math.min(...small)], "*");
    """
    source = render({"rich": rich, "worst": worst}[which]())
    source = source.replace("style-src", "script-src 'unsafe-inline'; style-src", 1)
    page = tmp_path / "probe.html"
    page.write_text(source.replace("</body>", f"<script>{measure}</script></body>"), "utf-8")
    found = re.search(r"<title>(.*?)</title>", opened(framed(page, width, 900), "--dump-dom"))
    assert found is not None
    inner, needed, over, smallest = json.loads(found[1])
    assert inner == width
    assert needed <= width
    assert over == 0
    assert smallest >= 8 or which == "worst"


@browser
def test_light_and_dark(tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    rich().to_html(page)
    means = {}
    for name, options in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        shot = tmp_path / f"{name}.png"
        opened(page, *options, "--window-size=1280,2000", f"--screenshot={shot}")
        with Image.open(shot) as picture:
            means[name] = float(np.asarray(picture.convert("L")).mean())
    assert means["light"] > 200
    assert means["dark"] < 70


@browser
def test_drawings_have_ink_in_both_colours(tmp_path: Path) -> None:
    """The text of a drawing stands out from the card it lies on."""
    probe = """
    const card = getComputedStyle(document.querySelector("section")).backgroundColor;
    const fills = [...document.querySelectorAll("svg text")].map((e) => getComputedStyle(e).fill);
    document.title = JSON.stringify([card, [...new Set(fills)]]);
    """
    source = render(rich()).replace("style-src", "script-src 'unsafe-inline'; style-src", 1)
    page = tmp_path / "p.html"
    page.write_text(source.replace("</body>", f"<script>{probe}</script></body>"), "utf-8")

    def light(colour: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3

    for options in ([], ["--blink-settings=preferredColorScheme=0"]):
        found = re.search(r"<title>(.*?)</title>", opened(page, *options, "--dump-dom"))
        assert found is not None
        card, fills = json.loads(found[1])
        assert fills
        for fill in fills:
            assert abs(light(fill) - light(card)) > 120, (card, fill)


def test_titles_of_drawings_are_told() -> None:
    labels: list[Any] = re.findall(r'role="img" aria-label="([^"]+)"', render(rich()))
    assert "Other criteria at equal budget" in labels
    assert len(labels) == 4
