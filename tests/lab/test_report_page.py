"""The page: whole without the network, the same every time, safe against names, and alive in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly", reason="the page needs the extra `report`")

from tests import report_cases as cases

from cntlora.lab.report import load_records, write_report
from cntlora.lab.report.page import build_page
from cntlora.lab.report.sentences import provenance

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return build_page(cases.few(), title="A & B")


@pytest.mark.published
def test_the_same_records_in_any_order_give_the_same_bytes(page: str) -> None:
    assert build_page(cases.few()[::-1], title="A & B") == page
    assert build_page(cases.few()[1:], title="A & B") != page


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    parsed = Page(page)
    sources = [a[key] for _, a in parsed.tags for key in ("src", "href", "srcset", "data", "poster") if a.get(key)]
    assert sources and all(source.startswith(("#", "data:")) for source in sources)
    assert len(parsed.scripts) == 3
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_ids_are_unique_and_every_link_and_plot_has_its_place(page: str) -> None:
    parsed = Page(page)
    ids = [a["id"] for _, a in parsed.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert all(str(a["href"])[1:] in ids for a in parsed.all("a"))
    content = json.loads(parsed.scripts[0])
    assert content["plots"].keys() == {a["id"] for a in parsed.all("div") if a.get("class") == "plot"}
    assert content["tables"].keys() == {a["data-copy"] for a in parsed.all("button") if "data-copy" in a}


def test_names_bring_no_markup() -> None:
    evil = "</script><script>alert(1)</script>"
    records = [r | {"label": evil, "git": evil, "experiment": evil} for r in cases.few()]
    records.append(cases.failed("eva", 0.01, 0) | {"experiment": evil})
    text = build_page(records, title=evil)
    assert evil not in text and len(Page(text).scripts) == 3
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text


def test_every_method_can_be_switched_and_has_a_row() -> None:
    parsed = Page(build_page(cases.few()))
    methods = {"lora", "eva", "self", "self+vas"}
    assert {a["data-toggle"] for a in parsed.all("input")} == methods
    assert {a["data-method"] for a in parsed.all("tr") if "data-method" in a} == methods


def test_studies_share_the_filter_but_not_their_tables() -> None:
    other = [r | {"experiment": "glue", "task": "rte"} for r in cases.few() if r["method"] != "eva"]
    parsed = Page(build_page([*cases.few(), *other]))
    assert [a["id"] for a in parsed.all("section") if a.get("class") == "study"] == ["glue", "tweets"]
    assert len(parsed.all("input")) == 4


def test_no_records_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        build_page([])


def test_provenance_counts_what_differs() -> None:
    runs = cases.few()
    assert dict(provenance(runs))["Commit"] == ["e8d4708"]
    runs[0]["git"], runs[1]["machine"] = "abc-dirty", None
    found = dict(provenance(runs))
    assert found["Commit"] == ["abc-dirty (1 run)", "e8d4708 (15 runs)"]
    assert found["Machine"][0] == "processor x86_64, 2 cores, threads 1, device cpu (15 runs)"


class TestWriteReport:
    @pytest.mark.parametrize(
        ("out", "page"), [("there", "there/page.html"), ("there/tweets.html", "there/tweets.html")]
    )
    def test_writes_the_page_and_beside_it_the_tables_and_figures(self, tmp_path: Path, out: str, page: str) -> None:
        cases.write(cases.few(), tmp_path / "results" / "tweets")
        written = write_report(tmp_path / "results", tmp_path / out)
        names = {path.relative_to(tmp_path).as_posix() for path in written}
        assert names >= {page, "there/tables.txt", "there/tables.md", "there/tables.tex"}
        assert names >= {f"there/figures/tweets-{name}.svg" for name in ("training-loss", "init-time")}
        assert sorted(p for p in (tmp_path / "there").rglob("*") if p.is_file()) == sorted(written)
        assert (tmp_path / page).read_text().startswith("<!doctype html>")

    def test_no_records_name_the_folder_and_write_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="empty"):
            write_report(tmp_path / "empty", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_bad_kind_of_figure_writes_nothing(self, tmp_path: Path) -> None:
        cases.write(cases.few(), tmp_path / "r")
        with pytest.raises(ValueError, match="gif"):
            write_report(tmp_path / "r", tmp_path / "out", figures="gif")
        assert not (tmp_path / "out").exists()

    def test_the_criterion_reaches_the_tables(self, tmp_path: Path) -> None:
        cases.write(cases.few(), tmp_path / "r")
        write_report(tmp_path / "r", tmp_path / "out", criterion="accuracy", figures=None)
        assert "highest accuracy at the last evaluation" in (tmp_path / "out" / "tables.txt").read_text()
        assert not (tmp_path / "out" / "figures").exists()


def test_the_package_loads_no_plotting() -> None:
    code = "import sys, cntlora.lab.report; print({'plotly', 'matplotlib', 'jinja2', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr


# What a reader does, inside the page: it ends with its findings in an element that `--dump-dom` prints.
PROBE = """
<script>
addEventListener("load", async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const boxes = [...document.querySelectorAll(".plot")];
  const drawn = () => boxes.filter((box) => box.querySelector("svg.main-svg")).length;
  for (let i = 0; i < 400 && drawn() < boxes.length; i++) await wait(50);
  const visible = (box) => box.data.filter((trace) => trace.visible !== false && !trace.meta.band).length;
  const shown = () => Object.fromEntries(boxes.filter((box) => box.data).map((box) => [box.id, visible(box)]));
  const all = [...document.querySelectorAll("table.sortable tr[data-method]")];
  const rows = () => all.filter((row) => row.offsetHeight > 0).map((row) => row.dataset.method);
  const column = (table, j) => [...table.tBodies[0].rows].map((r) => r.cells[j].dataset.value ?? null);
  const found = { drawn: drawn(), boxes: boxes.length };
  found.before = { shown: shown(), rows: rows() };
  const sheets = [...document.querySelectorAll("[data-sample]")];
  const picked = () => sheets.filter((sheet) => sheet.offsetHeight > 0).map((sheet) => sheet.dataset.sample);
  const pick = document.querySelector("[data-pick]");
  found.picked = [picked()];
  if (pick) {
    pick.value = "2";
    pick.dispatchEvent(new Event("change"));
    found.picked.push(picked());
  }
  const drawnWhole = (image) => image.offsetHeight > 0 && image.complete && image.naturalWidth === 96;
  found.images = [...document.images].filter(drawnWhole).length;
  document.querySelector('[data-toggle="eva"]').click();
  await wait(300);
  found.without = { shown: shown(), rows: rows() };
  document.querySelector('[data-preset="ours"]').click();
  await wait(300);
  found.ours = rows();
  document.querySelector('[data-preset="none"]').click();
  await wait(300);
  found.none = { shown: shown(), rows: rows() };
  document.querySelector('[data-preset="all"]').click();
  await wait(300);
  const table = document.querySelector("table.sortable");
  const head = table.querySelectorAll("tr.heads th")[3];
  found.orders = [];
  for (let press = 0; press < 4; press++) {
    found.orders.push([head.getAttribute("aria-sort"), column(table, 3)]);
    head.querySelector("button").click();
  }
  const ink = () => boxes[0].layout?.font.color;  // none where no plot was drawn
  found.inks = [];
  for (let press = 0; press < 2; press++) {
    document.getElementById("theme").click();
    await wait(300);
    found.inks.push(ink());
  }
  found.wide = document.documentElement.scrollWidth - innerWidth;
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


# The start of printing, of which a page hears before it is laid out on paper.
PRINTING = """
<script>
addEventListener("load", async () => {
  const boxes = [...document.querySelectorAll(".plot")];
  const drawn = () => boxes.filter((box) => box.querySelector("svg.main-svg")).length;
  await new Promise((done) => setTimeout(done, 1000));
  const before = drawn();
  dispatchEvent(new Event("beforeprint"));
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify({ before, drawn: drawn(), boxes: boxes.length });
  document.body.append(out);
});
</script>
"""


def browse(
    text: str, folder: Path, extra: str = "", probe: str = PROBE, height: int = 12000
) -> tuple[dict[str, Any], list[str]]:
    """Open a page in a headless browser without network: what the probe found, and the console's messages."""
    (folder / "page.html").write_text(text.replace("</body>", extra + probe + "</body>"))
    # the window is as tall as the page: plots are drawn when they come near it, and nothing scrolls without frames
    options = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=60000"
    command = [str(BROWSER), *options.split(), f"--window-size=1280,{height}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "page.html").as_uri()]
    # on a crowded machine the virtual clock may run out before the first frame, without which no plot is drawn
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        written = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
        plain = written[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") if written else "{}"
        found = json.loads(plain)
        if found and found["drawn"] == found["boxes"]:
            break
    assert found, done.stderr[-2000:]
    return found, re.findall(r".*:CONSOLE.*", done.stderr)


@pytest.mark.published
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
class TestBrowser:
    @pytest.fixture(scope="class")
    def seen(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
        folder = tmp_path_factory.mktemp("page")
        records = load_records(cases.write(cases.with_samples(cases.few(), folder), folder))
        return browse(build_page(records), folder)

    def test_opens_whole_without_a_message_or_a_request(self, seen: tuple[dict[str, Any], list[str]]) -> None:
        found, messages = seen
        assert messages == [] and found["requests"] == []
        assert found["drawn"] == found["boxes"] > 10
        assert found["wide"] <= 0

    def test_a_message_and_a_request_would_be_seen(self, tmp_path: Path) -> None:
        extra = '<script>console.error("broken"); fetch("https://example.invalid/x").catch(() => {});</script>'
        found, messages = browse(build_page(cases.few()), tmp_path, extra)
        assert found["requests"] == ["https://example.invalid/x"]
        assert any("broken" in message for message in messages)

    def test_switching_a_method_off_takes_its_traces_and_rows(self, seen: tuple[dict[str, Any], list[str]]) -> None:
        found, _ = seen
        before, without = found["before"], found["without"]
        curves = [name for name in before["shown"] if "-curves-" in name]
        assert curves and all(before["shown"][name] == 4 and without["shown"][name] == 3 for name in curves)
        assert "eva" in before["rows"] and set(without["rows"]) == {"lora", "self", "self+vas"}

    def test_a_sample_is_chosen_by_name_and_its_pictures_are_drawn(
        self, seen: tuple[dict[str, Any], list[str]]
    ) -> None:
        assert seen[0]["picked"] == [["0"], ["2"]] and seen[0]["images"] == 4 * 4

    def test_presets_choose_groups(self, seen: tuple[dict[str, Any], list[str]]) -> None:
        found, _ = seen
        assert set(found["ours"]) == {"self", "self+vas"}
        assert found["none"]["rows"] == [] and set(found["none"]["shown"].values()) == {0}

    def test_a_head_sorts_up_down_and_back(self, seen: tuple[dict[str, Any], list[str]]) -> None:
        (first, start), (up, rising), (down, falling), (last, end) = seen[0]["orders"]
        assert (first, up, down, last) == (None, "ascending", "descending", None)
        numbers = [float(value) for value in rising]
        assert numbers == sorted(numbers) and falling == rising[::-1] and end == start != falling

    def test_printing_draws_the_plots_that_nobody_scrolled_to(self, tmp_path: Path) -> None:
        found, messages = browse(build_page(cases.few()), tmp_path, probe=PRINTING, height=600)
        assert messages == [] and found["before"] < found["drawn"] == found["boxes"]

    def test_plots_follow_the_theme(self, seen: tuple[dict[str, Any], list[str]]) -> None:
        light, dark = seen[0]["inks"]
        assert light != dark
