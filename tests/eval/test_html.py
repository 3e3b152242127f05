"""The page of a comparison: complete, escaped, loading nothing; and in a browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers.reports import MADE, NASTY, make_report

from eval.compare.changed import Card
from eval.compare.report import difference_cells, markdown, system_cells, verdict_cells
from eval.html.charts import Dot, Interval, Row, dots_by_group, intervals, scatter
from eval.html.page import numeric_columns, page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "input", "br", "link"}
LOADS = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")


class Reader(HTMLParser):
    """Keeps tags, attributes and texts; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report():
    return make_report(title=f"Title {NASTY}")


@pytest.fixture(scope="module")
def text(report):
    return page(report)


def test_nothing_is_loaded_from_elsewhere_and_every_tag_is_closed(text):
    read = Reader(text)
    assert read.open == []
    for tag, attributes in read.tags:
        for name in LOADS:
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, value)
    assert re.findall(r"url\(|@import|https?://", text) == []
    (policy,) = [tag["content"] for tag in read.named("meta") if tag.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len(read.named("script")) == 1


def test_texts_of_items_and_titles_are_escaped(text, report):
    read = Reader(text)
    assert not [tag for tag, attributes in read.tags if any(name.startswith("on") for name in attributes)]
    assert all(tag["src"].startswith("data:image/") for tag in read.named("img"))
    whole = "".join(read.texts)
    assert whole.count(NASTY) >= sum(a.prediction == NASTY for q in report.changed for a in q.answers)
    assert NASTY not in text


def test_hostile_golds_questions_kinds_labels_and_errors_are_escaped(report):
    card = report.cards[0]
    answer = replace(card.questions[0].answers[0], error=NASTY, label=NASTY)
    hostile = replace(
        card.questions[0], question=NASTY, gold=(NASTY, NASTY), kind=NASTY, split=NASTY, id=NASTY, answers=(answer,)
    )
    text = page(replace(report, cards=[Card(None, (hostile,))], settings={"odd": NASTY}))
    assert NASTY not in text
    read = Reader(text)
    assert "".join(read.texts).count(NASTY) == 9 + 2  # these, and the title twice
    (shown,) = [tag for tag in read.named("div") if tag.get("class") == "question"]
    assert shown["data-id"] == NASTY
    assert not [tag for tag, attributes in read.tags if any(name.startswith("on") for name in attributes)]


def test_every_changed_item_has_its_card_answers_and_picture(text, report):
    read = Reader(text)
    shown = [tag for tag in read.named("div") if tag.get("class") == "question"]
    assert sorted(tag["data-id"] for tag in shown) == sorted(q.id for q in report.changed)
    assert len(read.named("img")) == len(report.cards) == len({(q.task, q.image_key) for q in report.changed})
    whole = html.unescape("".join(read.texts))
    assert all(q.question in whole and all(gold in whole for gold in q.gold) for q in report.changed)
    by_id = {tag["data-id"]: tag["data-changes"] for tag in shown}
    assert all(by_id[q.id] == " ".join(f"{n}:{c}" for n, c in q.changes.items()) for q in report.changed)


def test_changes_are_those_of_the_comparisons(report):
    for number, pair in enumerate(report.pairs):
        worse = sum(c.difference.worse for c in pair.comparisons)
        assert sum(q.changes.get(number) == "lost" for q in report.changed) == worse > 0
        assert sum(q.changes.get(number) == "won" for q in report.changed) == sum(
            c.difference.better for c in pair.comparisons
        )


def test_no_more_pictures_than_asked_for_and_the_rest_is_counted():
    report = make_report(pictures=3)
    assert len(report.cards) == 3
    assert report.shown < len(report.changed)
    assert "compare.json names the others" in page(report)
    none = make_report(pictures=0)
    assert 'class="card"' not in page(none)


def test_markdown_and_json_hold_both_comparisons_with_the_matching_rule(report):
    told = markdown(report)
    assert "| int4 AWQ | dense twin | dense baseline | active parameters (x 0.99)" in told
    assert "| int4 AWQ | bf16 | own full precision | - | 1 |" in told
    assert MADE["command"] in told
    assert all(line.count(" | ") == told_columns(told, line) for line in told.splitlines() if line.startswith("| "))
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [pair["margin"] for pair in written["pairs"]] == [0.01, 0.02, 0.02]
    assert written["pairs"][1]["matching"]["matched"] == ["active parameters", "device bytes"]
    assert len(written["pairs"][0]["lost"]) == sum(c.difference.worse for c in report.pairs[0].comparisons)
    assert written["systems"][1]["size"]["total"] == 10_717_056


def told_columns(told: str, line: str) -> int:
    """Separators in the header of the table that ``line`` stands in."""
    lines = told.splitlines()
    index = lines.index(line)
    while lines[index - 1].startswith("| "):
        index -= 1
    return lines[index].count(" | ")


def test_tables_have_a_row_a_pair_system_and_comparison(report):
    for cells, rows in ((verdict_cells, 3), (system_cells, 3), (difference_cells, 6)):
        columns, found = cells(report)
        assert len(found) == rows
        assert {len(row) for row in found} == {len(columns)}


def test_numeric_columns_are_told_from_words():
    rows = [["a", "1.5", "-0.2 .. +3.4", "3 / 4", "-", "12,345 / -"], ["b", "-", "0.0 .. 1.0", "1 / 0", "-", "-"]]
    assert numeric_columns(rows) == {1, 2, 3, 5}
    assert numeric_columns([]) == set()


def test_charts_place_values_where_the_scale_has_them():
    chart = str(scatter([Dot("a", 0, 5.0, 90.0), Dot("b", 1, 10.0, 95.0), Dot("<c>", 2, None, 92.0)], "MiB", "score"))
    first, second = (float(x) for x in re.findall(r'cx="([\d.]+)"', chart))
    assert (first - 46) * 2 == pytest.approx(second - 46, abs=0.2)  # from zero, twice as far
    high, low = (float(y) for y in re.findall(r'cy="([\d.]+)"', chart)[::-1])
    assert high < low
    assert "&lt;c&gt;" in chart
    assert "<c>" not in chart
    rows = [Interval("a - b", 0, -0.5, -1.5, 0.5, 1.0, "inconclusive"), Interval("c - b", 1, 3, 2, 4, 2.0, "superior")]
    drawn = str(intervals(rows))
    assert drawn.count('class="margin"') == 2
    grouped = str(dots_by_group([Row("all", 9, (50.0, 100.0))], ["a", "b"], "by kind"))
    assert len(re.findall("<circle", grouped)) == 2


def test_a_chart_of_equal_or_perfect_scores_has_room():
    for y in (0.0, 50.0, 100.0):
        chart = str(scatter([Dot("a", 0, 0.0, y), Dot("b", 1, None, y)], "MiB", "score"))
        assert "nan" not in chart
        assert all(-1 <= float(v) <= 241 for v in re.findall(r'cy="([\d.-]+)"', chart))
    flat = str(intervals([Interval("a", 0, 0.0, 0.0, 0.0, 1.0, "non-inferior")]))
    assert "nan" not in flat


PROBE = """<!doctype html><meta charset="utf-8"><body><pre id="out"></pre>FRAMES<script>
const report = {};
onload = () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    const boxes = [...page.querySelectorAll(".tile, figure, .card, .scroll, h1, p, pre")];
    const fits = boxes.every((box) => box.getBoundingClientRect().right <= root.clientWidth + 1);
    const shown = () => [...page.querySelectorAll(".question")].filter((q) => !q.hidden).length;
    const found = { width: root.clientWidth, content: root.scrollWidth, fits };
    found.title = page.title;
    found.all = shown();
    found.pictures = [...page.images].filter((i) => i.complete && i.naturalWidth > 0).length;
    const form = page.querySelector("#filter");
    form.elements.pair.value = "0"; form.elements.change.value = "lost";
    form.dispatchEvent(new frame.contentWindow.Event("input"));
    found.lost = shown();
    const table = page.querySelectorAll("table.sortable")[1], column = table.tHead.rows[0].cells[2];
    const values = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent);
    column.click(); found.up = values();
    column.click(); found.down = values();
    report[frame.id] = found;
  }
  document.querySelector("#out").textContent = JSON.stringify(report);
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH: apt-get install chromium, or your browser's package")
def test_in_a_browser_nothing_overflows_scripts_of_items_do_not_run_and_tables_sort(tmp_path, text, report):
    frames = [
        f'<iframe id="w{width}" width="{width}" height="900" srcdoc="{html.escape(text.replace(LAZY, ""))}"></iframe>'
        for width in (400, 1400)
    ]
    (tmp_path / "probe.html").write_text(PROBE.replace("FRAMES", "".join(frames)), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path}/probe.html"], capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL).group(1)))
    lost = sum(q.changes.get(0) == "lost" for q in report.changed)
    for name, width in (("w400", 400), ("w1400", 1400)):
        seen = found[name]
        assert width - 20 <= seen["width"] <= width
        assert seen["content"] <= seen["width"]
        assert seen["fits"]
        assert seen["title"] == report.title
        assert (seen["all"], seen["lost"]) == (len(report.changed), lost)
        assert seen["pictures"] == len(report.cards)
        assert seen["up"] == sorted(seen["up"], key=float)
        assert seen["down"] == sorted(seen["up"], key=float, reverse=True)


LAZY = ' loading="lazy"'
