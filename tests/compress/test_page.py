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
from compress import page as page_module
from compress.comparison import Comparison, Curve
from compress.drift import Agreement, Drift, SampleDrift
from compress.page import render, render_study
from compress.pruning import Step
from compress.reporting import Measured, Report
from compress.sensitivity import Row, Sensitivity

HOSTILE = "</style></script><script>alert('x')</script><!-- &\"$a_b$"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = ("meta", "br", "wbr", "path", "use", "image")


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
        data = data.replace("\N{NO-BREAK SPACE}", " ")  # numbers stay with their units
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
    costs, classes, removed, rivals, widths, steps = page.tables
    assert ["MACs", "400,000", "196,000", "49 %", ""] in costs
    assert ["latency, ms", "1", "0.6", "60 %", ""] in costs
    assert ["8", "45", "100 %", "93.3 %", "3 / 0", "1", ""] in classes
    assert classes[-1][:4] == ["all", "450", "99.6 %", "98.7 %"]
    assert removed[0] == ["Criterion", "30 %", "50 %", "60 %"]
    assert removed[1:] == [
        [f"{name} / none", "30 %", "50 %", "60 %"] for name in ("lrp", "random", "weight", "activation")
    ]
    assert [row[0] for row in rivals[1:]] == ["weight", "lrp:epsilon_plus (this run)", "random"]
    assert rivals[0][1:3] == ["MACs left", "Parameters left"]
    assert rivals[1] == ["weight", "49 %", "45 %", "99 %", "97.7 to 99.7 %"]
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
    assert page.tags.count("svg") == 5


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


def unequal() -> Comparison:
    """Asked for 30, 50 and 60 %, random removes up to 5 points more, because its widths are rounded."""
    found = comparison()
    wide = tuple(
        dataclasses.replace(c, removed=(0.31, 0.55, 0.62)) if c.criterion == "random" else c for c in found.curves
    )
    return dataclasses.replace(found, curves=wide)


def test_unequal_budgets_are_in_the_open() -> None:
    source = render_study("c", {"comparison": unequal().to_json()})
    page = Page(source)
    assert "Other criteria, not at equal budget" in page.text
    assert "where they differ most, asked for 50 %, random / none removed 55 % of the MACs" in page.text
    assert "<details open>" in source
    assert ["random / none", "31 %", "55 %", "62 %"] in page.tables[0]
    equal = render_study("c", {"comparison": comparison().to_json()})
    assert "Other criteria at equal budget" in equal
    assert "Budgets are not equal" not in equal
    assert "<details open>" not in equal


def test_a_panel_for_each_treatment_with_the_runs_criterion_in_bold() -> None:
    own = dataclasses.replace(rich(), settings={"criterion": {"name": "weight"}})
    names = re.findall(r"<text style=\"(?:font(?:-weight)?: ?(700))?[^>]*>([^<]* / none[^<]*)</text>", render(own))
    each = [("700", "weight / none"), ("", "lrp / none"), ("", "random / none"), ("", "activation / none")]
    assert names == 2 * each


def test_rivals_are_shown_in_the_quantity_of_the_target() -> None:
    report = rich()
    report = dataclasses.replace(report, target=Target(channels=0.7), limit=112.0, reached=104.0)
    rivals = next(t for t in Page(render(report)).tables if t[0][-1] == "95 % interval")
    assert rivals[0][1:4] == ["Channels left", "MACs left", "Parameters left"]
    assert rivals[1][1:4] == ["65 %", "49 %", "45 %"]


def test_names_may_break_after_dots_and_numbers_stay_with_their_units() -> None:
    report = dataclasses.replace(
        rich(), widths={"layer1.0.conv1": (4, 2)}, notes=("See layer1.0.conv1: 12.5 % or < 0.1 ms at p = 0.5.",)
    )
    source = render(report)
    assert "<bdi>layer1.<wbr>0.<wbr>conv1</bdi>" in source
    space = "\N{NO-BREAK SPACE}"
    assert f"12.5{space}% or &lt;{space}0.1{space}ms at p{space}={space}0.5.</bdi>" in source
    assert source.count("<title>") == 1
    title = render(dataclasses.replace(report, title="net.a.b at 5 %"))
    assert "<title>net.a.b at 5 %</title>" in title  # no tags in there


def test_one_rate_makes_no_curve() -> None:
    one = Comparison((0.5,), "macs", (Curve("lrp", "none", True, ((0.9,),), (0.5,)),
                     Curve("random", "none", True, ((0.8,),), (0.5,))), 0.99)  # fmt: skip
    page = Page(render_study("c", {"comparison": one.to_json()}))
    assert "svg" not in page.tags
    assert "0.9000" in page.text
    for word in ("thick line", "hollow", "Bars", "trapezoid", "of area"):
        assert word not in page.text  # there is none to be seen
    assert "single draw of the reference samples" in page.text


@pytest.mark.parametrize(
    ("draws", "common", "words", "wrong"),
    [
        ((1, 1), 0.1, "From a single draw", "standard errors"),
        ((1, 3), 1.0, "standard errors over draws of random orders; all else is from a single draw", "samples, and"),
        ((3, 3), 0.1, "standard errors over draws of the reference samples", "too small"),
        ((3, 3), 0.8, "Two draws share 80 % of their samples, so that these errors are too small", "single"),
    ],
)
def test_what_the_errors_are_of(draws: tuple[int, int], common: float, words: str, wrong: str) -> None:
    curves = [
        Curve(name, "none", False, tuple((0.9 - k / 100, 0.8) for k in range(n)), (0.5, 0.6))
        for name, n in zip(("lrp", "random"), draws, strict=True)
    ]
    found = Comparison((0.5, 0.6), "macs", tuple(curves), 0.99, settings={"common": common})
    page = Page(render_study("c", {"comparison": found.to_json()}))
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert words in text
    assert wrong not in text
    assert "The thick line is" in text
    report = by_hand(sections={"comparison": found.to_json()})
    assert any("lrp" in s and "random" in s for s in report.sentences)


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


def plausible() -> Report:
    """Names and numbers as they are met: a residual network, classes of two words, small p values."""
    report = rich()
    assert report.classes is not None
    names = ("golden retriever", "hammerhead shark", "lynx")
    rows = [dataclasses.replace(c, name=names[k % 3], adjusted=1.2e-05) for k, c in enumerate(report.classes.rows)]
    return dataclasses.replace(
        report,
        classes=dataclasses.replace(report.classes, rows=tuple(rows)),
        widths={"conv1": (64, 64), "layer1.0.conv1": (512, 256), "layer4.1.downsample.0": (2048, 1024)},
        protected={"layer4.1.downsample.0": "its channels are the network's output"},
        notes=("Mind layer1.0.conv1 and features.denseblock4.denselayer16.conv2 of lrp:epsilon_plus.",),
    )


@browser
@pytest.mark.parametrize("which", ["plausible", "worst"])
def test_tables_on_a_phone(which: str, tmp_path: Path) -> None:
    """Usual ones fit; others scroll in their own box up to the last column. Names break after dots only."""
    measure = r"""
    document.querySelectorAll("details").forEach((d) => { d.open = true; });
    const boxes = [...document.querySelectorAll(".wide")];
    const scrolled = boxes.filter((b) => b.scrollWidth > b.clientWidth + 1);
    const loose = [...document.querySelectorAll("table")].filter((t) => !t.closest(".wide"));
    const lost = boxes.filter((b) => {
      if (getComputedStyle(b).overflowX !== "auto") return true;
      b.scrollLeft = b.scrollWidth;
      const end = b.getBoundingClientRect().right;
      return [...b.querySelectorAll("tr > :last-child")].some((c) => c.getBoundingClientRect().right > end + 1);
    });
    const broken = [];
    for (const place of document.querySelectorAll("th, td, p, li, dt")) {
      const walk = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
      while (walk.nextNode()) {
        for (const found of walk.currentNode.data.matchAll(/[\w:]+/g)) {
          const range = document.createRange();
          range.setStart(walk.currentNode, found.index);
          range.setEnd(walk.currentNode, found.index + found[0].length);
          if (new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1) broken.push(found[0]);
        }
      }
    }
    parent.postMessage([scrolled.length, loose.length, lost.length, broken,
                        document.documentElement.scrollWidth], "*");
    """
    source = render({"plausible": plausible, "worst": worst}[which]())
    source = source.replace("style-src", "script-src 'unsafe-inline'; style-src", 1)
    page = tmp_path / "probe.html"
    page.write_text(source.replace("</body>", f"<script>{measure}</script></body>"), "utf-8")
    found = re.search(r"<title>(.*?)</title>", opened(framed(page, 390, 900), "--dump-dom"))
    assert found is not None
    scrolled, loose, lost, broken, needed = json.loads(found[1])
    assert (loose, lost, needed) == (0, 0, 390)
    assert (scrolled == 0) is (which == "plausible")
    assert [name for name in broken if len(name) < 40] == []  # one longer than a line has to break somewhere


def test_colours_stand_out() -> None:
    """Contrast of the Web Content Accessibility Guidelines: 4.5 for text, 3 for drawings; print is always light."""
    css = Path(page_module.__file__).with_name("templates").joinpath("page.css").read_text("utf-8")

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    light, dark = (dict(re.findall(r"--([\w]+): (#\w+);", block)) for block in css.split("@media", 2)[:2])
    for theme in (light, dark):
        assert len(theme) >= 17
        for text, grounds in (("ink", ("card", "ground", "note")), ("soft", ("card", "ground")), ("loss", ("card",))):
            for ground in grounds:
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        for drawn in ("faint", "left", *(f"c{k}" for k in range(8))):
            assert contrast(theme[drawn], theme["card"]) >= 3, drawn
    assert css.count("prefers-color-scheme") == css.count("@media screen and (prefers-color-scheme: dark)") == 1


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
    assert "Other criteria at equal budget: batch norm re-estimated" in labels
    assert "Other criteria at equal budget: as cut" in labels
    assert len(labels) == 5
