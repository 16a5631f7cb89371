"""The page: what it says, what it embeds, what it survives, and what a browser makes of it."""

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
import pandas as pd
import pytest
from by_hand import KINDS, by_hand
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lrp import errors
from neuralize import CentroidHead, CoverageWarning, Explanation, NeuralizedModel, describe, neuralize
from neuralize._page_rows import choose
from neuralize.page import alternatives, render
from neuralize.sentences import of_row

HOSTILE = "</script><script>alert('x')</script><!-- &\"$a_b$"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """Tags, the links to anything outside, the visible text, the embedded data, the cells of the rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: dict[str, str] = {}
        self.text = self.script = ""
        self.data: list[Any] = []
        self.cells: list[list[str]] = []
        self._embedded = self._rows = False
        self._id: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        self._embedded = given.get("type") == "application/json"
        self._id = given.get("id", self._id)
        self._rows = self._rows or given.get("id") == "rows"
        if self._rows and tag == "tr":
            self.cells.append([])
        if self._rows and tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._rows = self._rows and tag != "table"

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            if self._embedded:
                self.data.append(json.loads(data))
            else:
                self.script += data
            return
        self.text += data
        if self._rows and self.cells and self.cells[-1]:
            self.cells[-1][-1] += data.strip("\n")
        if self._id:
            self.ids[self._id] = self.ids.get(self._id, "") + data


@pytest.fixture(scope="module")
def net(wine: pd.DataFrame) -> NeuralizedModel:
    return neuralize(make_pipeline(StandardScaler(), KMeans(3, n_init=10, random_state=0)).fit(wine))


@pytest.fixture(scope="module")
def bottles(net: NeuralizedModel, wine: pd.DataFrame) -> Explanation:
    return net.explain(wine.set_index(pd.Index([f"bottle {i}" for i in range(len(wine))])))


@pytest.fixture(scope="module")
def others(net: NeuralizedModel, wine: pd.DataFrame) -> dict[str, Explanation]:
    return alternatives(net, wine, contrasts=[2])


# ---------------------------------------------------------------------- without a browser


def test_page(bottles: Explanation, others: dict[str, Explanation], tmp_path: Path) -> None:
    path = bottles.to_html(tmp_path / "page.html", alternatives=others)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert not page.open
    assert not page.links
    for outside in ("url(", "@import", "http:", "https:", "fetch(", "innerHTML"):
        assert outside not in source
    assert "default-src 'none'" in source
    assert "width=device-width" in source
    for portrait in describe(bottles):
        assert portrait.sentence in page.text
    for name in bottles.feature_names:
        assert name in page.text
    # the table of rows is there without scripts
    assert page.cells[0] == ["Row", "Explained", "Decided", "Output", "Coverage", "Counts most"]
    assert [cells[0] for cells in page.cells[1:]] == list(bottles.index)
    assert [cells[2] for cells in page.cells[1:]] == [f"cluster {c}" for c in bottles.decided]
    outputs = [float(cells[3].replace(",", "")) for cells in page.cells[1:]]
    np.testing.assert_allclose(outputs, bottles.output, rtol=6e-3)
    for i, cells in enumerate(page.cells[1:]):
        strongest = bottles.feature_names[int(np.abs(bottles.values[i]).argmax())]
        assert cells[5].split(" ")[1] == strongest


@pytest.mark.parametrize("kind", [*KINDS, "wine", "duels"])
def test_what_is_embedded_adds_up(
    kind: str, bottles: Explanation, others: dict[str, Explanation], tmp_path: Path
) -> None:
    made = {"wine": [bottles], "duels": [bottles, *others.values()]}.get(kind) or [KINDS[kind]()]
    page = Page(render(made[0], alternatives={str(i): e for i, e in enumerate(made[1:])}))
    head, *data = page.data
    assert tuple(head["columns"]) == made[0].feature_names
    assert len(data) == len(made)
    for e, one in zip(made, data, strict=True):
        assert one["unit"] == e.unit
        assert [row["row"] for row in one["rows"]] == list(range(len(e)))
        for i, row in list(enumerate(one["rows"]))[:: max(len(e) // 12, 1)]:
            values = e.values[i]
            assert row["sentence"] == of_row(e, i).sentence
            assert row["output"] == pytest.approx(e.output[i], rel=1e-4)
            assert row["coverage"] == pytest.approx(e.coverage[i], rel=1e-4, abs=1e-9)
            for t, _, point, relevance in row["items"]:
                assert relevance == pytest.approx(values[t], rel=1e-4)
                assert not point or e.feature_names[t] not in e.categories
            total = sum(item[3] for item in row["items"]) + row["rest"][1] + sum(size for _, size in row["parts"])
            scale = np.abs(values).sum() + sum(abs(size) for _, size in row["parts"])
            assert total == pytest.approx(e.output[i], abs=1e-4 * scale)
            assert row["rest"][0] + len(row["items"]) == len(values)
            assert [row["items"][k][0] for k in row["pro"]] == [
                e.feature_names.index(r.name) for r in e.for_and_against(i).pro
            ]
            assert [row["items"][k][0] for k in row["con"]] == [
                e.feature_names.index(r.name) for r in e.for_and_against(i).con
            ]


def test_alternatives(net: NeuralizedModel, wine: pd.DataFrame, bottles: Explanation, recwarn: Any) -> None:
    found = alternatives(net, wine.iloc[:9], contrasts=[1], beta=np.inf)
    assert list(found) == [
        "cluster 0",
        "cluster 0 rather than cluster 1",
        "cluster 1",
        "cluster 2",
        "cluster 2 rather than cluster 1",
    ]
    np.testing.assert_array_equal(
        found["cluster 2 rather than cluster 1"].values, net.explain(wine.iloc[:9], target=2, contrast=1).values
    )
    assert list(alternatives(net, wine, targets=[2])) == ["cluster 2"]
    assert not [w for w in recwarn if issubclass(w.category, CoverageWarning)]  # the page says it
    with pytest.raises(errors.TargetError):
        alternatives(net, wine, targets=[7])
    with pytest.raises(errors.InputError, match="at most 100"):
        alternatives(net, wine, targets=[0] * 101)
    for wrong in (
        net.explain(wine.iloc[::-1]),
        net.explain(wine.iloc[1:]),
        neuralize(KMeans(2, n_init=1).fit(wine.to_numpy())).explain(wine.to_numpy()),
        {"no": "explanation"},
    ):
        with pytest.raises(errors.InputError, match="'why' is no explanation of the same rows"):
            bottles.to_html("unused.html", alternatives={"why": wrong})  # type: ignore[dict-item]


def test_questions_that_look_alike_are_told_apart(
    bottles: Explanation, net: NeuralizedModel, wine: pd.DataFrame
) -> None:
    page = Page(render(bottles, alternatives={"stiff": net.explain(wine, beta=np.inf)}))
    assert [(d["target"], d["contrast"]) for d in page.data[1:]] == [
        ("why each row is in its cluster", ""),
        ("stiff", ""),
    ]


def test_page_escapes(tmp_path: Path) -> None:
    net = NeuralizedModel(
        CentroidHead([[0.0, 0.0], [1.0, 3.0]]),
        labels=["<b>one", "two\u2028</script>"],
        feature_names=[HOSTILE, "\ud800"],
        source="<em>m",
    )
    e = dataclasses.replace(net.explain([[0.2, 0.1], [1.0, 2.0]]), index=pd.Index(["<u>r", "s"]))
    page = Page(e.to_html(tmp_path / "p.html", title="<script>t</script>").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 3
    assert not {"em", "u"} & set(page.tags)
    assert not page.open
    assert page.data[0]["columns"] == [HOSTILE, "?"]
    assert page.data[1]["rows"][1]["decided"] == "cluster two\u2028</script>"
    for text in (HOSTILE, "<b>one", "<script>t</script>", "<u>r"):
        assert text in page.text
    assert "alert" not in page.script
    for source in (e._repr_html_(), e.for_and_against(0)._repr_html_()):
        for tag in ("<b>one", "<em>", "<u>", "<script"):
            assert tag not in source


def test_page_of_many_columns_and_a_duel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    net = NeuralizedModel(CentroidHead(rng.normal(size=(4, 290))))
    e = net.explain(rng.normal(size=(30, 290)), target=1, contrast=2)
    page = Page(e.to_html(tmp_path / "p.html").read_text())
    assert "Cluster 1 rather than cluster 2" in page.text
    assert "260 more" in page.text
    assert "90 more with smaller relevance: left out here" in page.text
    assert "The 200 strongest columns" in page.text
    assert "from cluster 2" in page.text
    assert (page.data[1]["target"], page.data[1]["contrast"]) == ("cluster 1", "cluster 2")
    assert max(len(row["items"]) for row in page.data[1]["rows"]) <= 22


@pytest.mark.parametrize("kind", ["cluster", "density"])
def test_many_rows_leave_the_page_small(kind: str) -> None:
    sizes = []
    for n in (1000, 50_000):
        data = np.random.default_rng(0).normal(size=(n, 3))
        e = by_hand(data, data, kind=kind, labels=[0] if kind == "density" else [0, 1], slope=1, break_even=0)
        source = render(e)
        sizes.append(len(source))
        page = Page(source)
        shown = {row["row"] for row in page.data[1]["rows"]}
        assert len(shown) == len(page.data[1]["rows"]) == 500
        assert len(page.cells) == 501
        order = np.argsort(e.output if kind == "density" else np.abs(e.output))
        assert shown >= {*order[:166].tolist(), *order[-166:].tolist()}
        drawn = np.flatnonzero(np.isin(order, [*(shown - {*order[:166].tolist(), *order[-166:].tolist()})]))
        assert len(drawn) == 168
        assert np.median(drawn) == pytest.approx(n / 2, rel=0.25)  # from everywhere in between
        what = (
            ("of lowest density", "of highest density") if kind == "density" else ("nearest to the border", "farthest")
        )
        assert f"500 of {n:,} rows: the 166 {what[0]}, the 166 {what[1]}" in page.text
        assert "168 drawn at random" in page.text
        assert render(e) == source
    assert sizes[1] < 1.1 * sizes[0] < 800_000


def test_many_questions_leave_the_page_small() -> None:
    data = np.random.default_rng(0).normal(size=(1000, 3))
    e = by_hand(data, data)
    page = Page(render(e, alternatives={str(i): e for i in range(9)}))
    assert [len(d["rows"]) for d in page.data[1:]] == [200] * 10
    assert "200 of 1,000 rows" in page.text


def test_what_is_no_number_is_embedded_as_nothing() -> None:
    e = by_hand([[1.0, 2.0], [3.0, 4.0]], [[1.0, np.nan], [2.0, 7.0]], slope=1.0, break_even=0.0)
    e.output[1] = np.inf
    page = Page(render(e))
    assert page.data[1]["rows"][1]["output"] is None
    assert page.cells[2][3] == "-"
    assert page.data[1]["rows"][0]["items"][0][1:3] == ["missing", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_own_words(kind: str) -> None:
    e = KINDS[kind]()
    page = Page(render(e))
    assert "cluster" not in page.text.lower()
    for p in describe(e):
        assert p.heading in page.text
        assert p.sentence in page.text
    expected = {
        "outlier": ("What sets the outliers apart", "0 is the border between outliers and inliers", "an inlier"),
        "density": ("What makes rows usual or rare", "the lower, the rarer", "residual (normaliser)"),
        "value": (
            "What raises and lowers the prediction",
            "above the reference value 0, negative",
            "residual (intercept)",
        ),
        "class": ("What sets the classes apart", "favours its class over all others", "own (72 %)", "holds categories"),
    }
    for text in expected[kind]:
        assert text in page.text


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
    "--allow-file-access-from-files",
    "--virtual-time-budget=4000",
]


def opened(page: Path, address: str = "", width: int = 1280) -> str:
    """What the page is once its scripts have run."""
    assert BROWSER is not None
    command = [BROWSER, *QUIET, f"--user-data-dir={page.parent}/profile", f"--window-size={width},1600", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri() + address], check=True, capture_output=True, timeout=120)
    return done.stdout.decode()


def embedded(e: Explanation) -> np.ndarray:
    """Outputs with the five digits that a page holds."""
    return np.array([float(f"{v:.5g}") for v in e.output])


def with_script(page: Path, code: str) -> Path:
    """A copy of the page that runs some code at its end."""
    copy = page.with_name("probe.html")
    copy.write_text(page.read_text("utf-8").replace("</body>", f"<script>{code}</script></body>"), "utf-8")
    return copy


@pytest.fixture(scope="module")
def page(bottles: Explanation, others: dict[str, Explanation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bottles.to_html(tmp_path_factory.mktemp("page") / "p.html", alternatives=others)


@browser
def test_the_address_chooses_row_order_and_question(
    page: Path, bottles: Explanation, others: dict[str, Explanation]
) -> None:
    shown = Page(opened(page, "#row=3&sort=output"))
    assert of_row(bottles, 3).sentence in shown.ids["sentence"]
    assert shown.ids["why"].startswith("Row bottle 3: why cluster 2")
    assert [cells[0] for cells in shown.cells[1:]] == [
        f"bottle {i}" for i in np.argsort(embedded(bottles), kind="stable")
    ]
    assert shown.ids["sums"].strip().endswith("Output29.3")
    question = list(others).index("cluster 1 rather than cluster 2") + 1
    shown = Page(opened(page, f"#row=3&q={question}&sort=top&dir=desc"))
    duel = others["cluster 1 rather than cluster 2"]
    assert of_row(duel, 3).sentence in shown.ids["sentence"]
    assert of_row(duel, 3).sentence != of_row(bottles, 3).sentence
    tops = [cells[5].split(" ")[1] for cells in shown.cells[1:]]
    strongest = [duel.feature_names[t] for t in np.abs(duel.values).argmax(1)]
    assert sorted(tops) == sorted(strongest)
    assert tops[0] == max(strongest)
    assert tops[-1] == min(strongest)


@browser
def test_clicks_and_keys(page: Path, bottles: Explanation, others: dict[str, Explanation]) -> None:
    """Every control is a button or a select, so that keys reach it; here their events are sent."""
    code = """
    const heads = [...document.querySelectorAll("#rows thead button")];
    const log = [], note = () => log.push([document.getElementById("sentence").textContent,
      [...document.querySelectorAll("#rows tbody tr")].map((line) => Number(line.dataset.row)),
      [...document.querySelectorAll("#rows thead th")].map((h) => h.getAttribute("aria-sort")), location.hash]);
    const choose = (id, text) => { const s = document.getElementById(id);
      s.value = [...s.options].find((o) => o.text === text).value; s.dispatchEvent(new Event("change")); note(); };
    note();
    heads[3].click(); note(); heads[3].click(); note();
    document.getElementById("after").click(); note();
    document.querySelector("#rows tbody tr:nth-child(1) button").click(); note();
    choose("row", "bottle 20"); choose("target", "cluster 0"); choose("contrast", "cluster 2");
    const controls = [...document.querySelectorAll("button, select")].every((c) => c.tabIndex === 0);
    document.body.replaceChildren(JSON.stringify([log, controls]));
    """
    text = Page(opened(with_script(page, code))).text
    log, reachable = json.loads(text[text.index("[[") :])
    assert reachable
    sentences, orders, marks, places = zip(*log, strict=True)
    by_output = np.argsort(embedded(bottles), kind="stable").tolist()
    downwards = np.argsort(-embedded(bottles), kind="stable").tolist()
    assert orders[0] == list(range(178))
    assert (orders[1], orders[2]) == (by_output, downwards)
    assert [mark[3] for mark in marks[:3]] == ["none", "ascending", "descending"]
    assert [mark[0] for mark in marks[:3]] == ["ascending", "none", "none"]
    assert sentences[0] == sentences[2] == of_row(bottles, 0).sentence
    assert sentences[3] == of_row(bottles, 1).sentence
    assert sentences[4] == of_row(bottles, downwards[0]).sentence
    assert sentences[5] == of_row(bottles, 20).sentence
    assert sentences[6] == of_row(others["cluster 0"], 20).sentence
    assert sentences[7] == of_row(others["cluster 0 rather than cluster 2"], 20).sentence
    assert "row=20" in places[7]


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_runs_over_the_edge(width: int, page: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hostile = NeuralizedModel(
        CentroidHead(rng.normal(size=(3, 4)) * 3),
        labels=["<b>one</b>", "two'\"", "three " * 20],
        feature_names=[HOSTILE, "", "ünï\n行", "x" * 150],
    )
    X = rng.normal(size=(40, 4))
    odd = hostile.explain(X).to_html(tmp_path / "odd.html", alternatives=alternatives(hostile, X, contrasts=["two'\""]))
    names = tmp_path / "classes.html"
    measure = """
    const main = document.querySelector("main").getBoundingClientRect();
    const over = [...document.querySelectorAll("section > *")].filter(
      (e) => e.getBoundingClientRect().right > main.right);
    parent.postMessage([innerWidth, document.documentElement.scrollWidth, over.length,
      document.querySelectorAll("#bars .track").length], "*");
    """
    for each in (page, odd, KINDS["class"]().to_html(names)):
        probe = with_script(each, measure)
        frame = tmp_path / "frame.html"
        # headless windows are no narrower than 500 pixels; frames are
        frame.write_text(
            "<script>onmessage = (e) => { document.title = JSON.stringify(e.data); }</script>"
            f'<iframe src="{probe.as_uri()}#row=5" style="width:{width}px;height:900px;border:0"></iframe>'
        )
        found = re.search(r"<title>(.*?)</title>", opened(frame))
        assert found is not None
        inner, needed, over, bars = json.loads(found[1])
        assert inner == width
        assert needed <= width
        assert over == 0
        assert bars >= 3


@browser
def test_hostile_names_stay_text_in_a_browser(tmp_path: Path) -> None:
    names = [HOSTILE, '"><img src=x onerror=document.title="hit">', "b"]
    e = by_hand(np.ones((3, 3)), np.ones((3, 3)), names=names, index=pd.Index(["<i>r</i>", "</option>", "&amp;"]))
    source = opened(e.to_html(tmp_path / "p.html"), "#row=1")
    shown = Page(source)
    assert "img" not in shown.tags
    assert "hit" not in re.findall(r"<title>(.*?)</title>", source)[0]
    assert [cells[0] for cells in shown.cells[1:]] == ["<i>r</i>", "</option>", "&amp;"]
    assert HOSTILE in shown.ids["bars"]


@browser
def test_without_scripts_the_rest_is_there(page: Path, bottles: Explanation, tmp_path: Path) -> None:
    bare = tmp_path / "bare.html"
    bare.write_text(page.read_text("utf-8").replace("script-src 'unsafe-inline'", "script-src 'none'"), "utf-8")
    shown = Page(opened(bare, "#row=3&sort=output"))
    assert "sentence" not in {k for k, v in shown.ids.items() if v.strip()}
    assert [cells[0] for cells in shown.cells[1:]] == list(bottles.index)
    for portrait in describe(bottles):
        assert portrait.sentence in shown.text


def test_a_row_asked_for_is_on_the_page() -> None:
    net = NeuralizedModel(CentroidHead([[0.0, 0.0], [10.0, 3.0]]), feature_names=["age", "size"])
    e = net.explain(np.random.default_rng(0).normal(5, 3, (2000, 2)))
    left_out = next(i for i in range(2000) if i not in choose(e)[0])
    rows, text = choose(e, wanted=[left_out, 0])
    assert left_out in rows
    assert "asked for" in text
    sentence = of_row(e, left_out).sentence
    assert sentence in render(e, rows=[left_out])
    assert sentence not in render(e)
    with pytest.raises(errors.InputError, match="no such row"):
        render(e, rows=[2000])
