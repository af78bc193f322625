"""The pages of results: each fills from the tables of runs, can be read, and leads back to its runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("pyarrow", reason="tables of runs need the extra `lab`")
from benchmarks import overview, study_pages
from tests.lab.test_results import edited

TEMPLATES = sorted(path for path in study_pages.PAGES.glob("*.md") if path.name != "index.md")
pytestmark = pytest.mark.published


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, made once."""
    out = tmp_path_factory.mktemp("pages") / "results"
    study_pages.make(out)
    return out


def test_every_study_is_on_a_page_and_every_page_in_the_index(made: Path) -> None:
    pages = {path.name: path.read_text() for path in made.glob("*.md") if path.name != "index.md"}
    assert set(pages) == {template.name for template in TEMPLATES}
    runs = {table.stem for table in overview.RUNS.glob("*.parquet")}
    named = {name for text in pages.values() for name in re.findall(r"`studies/runs/(\w+)\.parquet`", text)}
    assert named == runs == {path.stem for path in (made / "files").iterdir()}
    listed = re.findall(r"^\| \[.+?\]\((\w+\.md)\) \|", (made / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def test_what_study_files_refer_to_is_there() -> None:
    files = sorted((study_pages.ROOT / "studies").rglob("*.toml"))
    named = {name for file in files for name in re.findall(r"\b(?:docs|studies)/[\w/.-]*\w", file.read_text())}
    assert "studies/pages" in named
    assert not [name for name in named if not (study_pages.ROOT / name).exists()]


def test_every_page_can_be_read(made: Path) -> None:
    """Questions as headings, a table of at most six rows each, two sentences or so before it."""
    for path in made.glob("*.md"):
        text = path.read_text()
        assert len(text.splitlines()) <= 250 and not re.search(r"<!--|[|] (None|nan)", text), path.name
        if path.name in ("index.md", "starts.md"):
            continue
        questions = text.partition("## Where the numbers come from")[0].split("\n## ")[1:]
        assert len(questions) >= 1
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len(table.splitlines()) <= 2 + study_pages.MOST_ROWS, path.name


def test_links_and_images_are_there(made: Path) -> None:
    docs = study_pages.ROOT / "docs"
    for path in made.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            target = docs / link.removeprefix("../") if link.startswith("../") else made / link
            assert target.is_file(), f"{path.name}: {link}"
    shown = "".join(path.read_text() for path in made.glob("*.md"))
    assert [image.name for image in study_pages.IMAGES.iterdir() if image.name not in shown] == []


def test_numbers_are_those_of_the_runs(made: Path) -> None:
    """By pandas alone, which knows nothing of our tables."""
    frame = pd.read_parquet(overview.RUNS / "tweets.parquet")
    found = frame[(frame["method"] == "descent") & (frame["learning_rate"] == 0.003)].set_index("seed")
    plain = frame[(frame["method"] == "lora") & (frame["learning_rate"] == 0.003)].set_index("seed")
    last = found["evaluations.loss"].map(lambda losses: losses[-1])
    difference = found["mean_loss"] - plain["mean_loss"]
    cells = [found["mean_loss"].mean(), found["mean_loss"].std(), last.mean(), last.std()]
    row = next(line for line in (made / "tweets.md").read_text().splitlines() if line.startswith("| CNTLoRA-D |"))
    plain_row = row.replace("**", "")
    assert f"{cells[0]:.3f} ± {cells[1]:.3f}" in plain_row and f"{cells[2]:.3f} ± {cells[3]:.3f}" in plain_row
    assert f"−{-difference.mean():.3f} ± {difference.std():.3f}" in plain_row


def test_a_page_says_which_methods_its_labels_stand_for(made: Path) -> None:
    """Before its first question; a page without such labels says nothing."""
    told = {}
    for path in made.glob("*.md"):
        head, _, rest = path.read_text().partition("\n## ")
        told[path.name] = re.findall(r"(CNTLoRA-\w+) is `", head)
        assert set(re.findall(r"^\| (CNTLoRA-\w+)", rest, re.MULTILINE)) <= set(told[path.name]), path.name
    assert told["tweets_300.md"] == ["CNTLoRA-D", "CNTLoRA-W"] and told["index.md"] == []
    assert "CNTLoRA-S" not in told["tweets_tolerance.md"]  # its rows are those of CNTLoRA-Sh


def test_another_run_makes_another_page(made: Path, tmp_path: Path) -> None:
    shutil.copytree(overview.RUNS, tmp_path / "runs")
    edited(overview.RUNS / "pairs.parquet", tmp_path / "runs", "descent", 0.001)
    template = study_pages.PAGES / "pairs.md"
    assert study_pages.filled(template) == (made / "pairs.md").read_text()
    assert study_pages.filled(template, tmp_path / "runs") != (made / "pairs.md").read_text()


def test_the_starts_are_those_of_their_record(made: Path, tmp_path: Path) -> None:
    record = json.loads((study_pages.RECORDS / "starts.json").read_text())
    record["tasks"]["pairs"]["starts"]["self"]["size"] = 9.87
    (tmp_path / "starts.json").write_text(json.dumps(record))
    template = study_pages.PAGES / "starts.md"
    assert study_pages.filled(template) == (made / "starts.md").read_text()
    assert study_pages.filled(template, records=tmp_path) != (made / "starts.md").read_text()


def test_a_wrong_template_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "pairs.md"
    many = "lora, eva, lora_ga, self, descent, self+vas, cross+vas"
    page.write_text(f"# Title\n\nSummary.\n\n<!-- table {many} | loss -->\n")
    with pytest.raises(ValueError, match="a table has 7 rows, expected at most 6"):
        study_pages.filled(page)
    page.write_text("# Title\n\nSummary.\n\n<!-- table lora, nosuch | loss -->\n")
    with pytest.raises(KeyError, match="nosuch"):
        study_pages.filled(page)
    page.write_text("# Title\n\nSummary.\n\n<!-- tables lora | loss -->\n")
    with pytest.raises(ValueError, match="no directive but table, rates, lasting and starts"):
        study_pages.filled(page)
