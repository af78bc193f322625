"""What is published under docs/ and results/ is what the records give, to the byte."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("plotly", reason="the page needs the extra `report`")
from benchmarks import overview

from cntlora.lab.report import load_records, studies, write_into, write_report
from cntlora.lab.report.bases import strangers

ROOT = Path(__file__).parents[2]
RESULTS, DOCS = ROOT / "results", ROOT / "docs" / "results.md"
pytestmark = pytest.mark.published
FOLDERS = sorted({path.parent for path in RESULTS.glob("*/*.json")})


def test_there_are_results() -> None:
    assert {"tweets", "tweets_100"} <= {folder.name for folder in FOLDERS}


def test_every_record_names_the_command_that_makes_it_again() -> None:
    for record in load_records(RESULTS):
        file = f"{record['experiment']}.toml"
        grid = f"--methods {record['method']} --learning-rates {record['learning_rate']:g} --seeds {record['seed']}"
        # studies/ was called experiments/ when most of them were made
        assert record["command"].replace("experiments/", "studies/") == f"cntlora compare studies/{file} {grid}"
        assert (ROOT / "studies" / file).is_file()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_of_the_docs_are_those_of_the_records(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "results.md"
    shutil.copy(DOCS, copy)
    write_into(copy, folder)
    assert copy.read_bytes() == DOCS.read_bytes()
    # the control: one changed record changes the tables
    changed = tmp_path / "records"
    shutil.copytree(folder, changed)
    first = next(path for path in sorted(changed.glob("lora-*.json")))
    record = json.loads(first.read_text())
    record.pop("digest", None)  # which would refuse what was edited
    first.write_text(json.dumps({**record, "mean_loss": 0.1}))
    write_into(copy, changed)
    assert copy.read_bytes() != DOCS.read_bytes()


def test_the_tables_of_the_advice_are_those_of_the_records(tmp_path: Path) -> None:
    text = overview.CHOOSING.read_text()
    assert overview.filled(overview.CHOOSING, RESULTS) == text
    shutil.copytree(RESULTS, tmp_path / "results")  # the control: one changed record changes the tables
    first = next(path for path in sorted((tmp_path / "results" / "pairs").glob("descent-lr0.001-*.json")))
    record = json.loads(first.read_text())
    record.pop("digest", None)
    first.write_text(json.dumps({**record, "mean_loss": 0.1}))
    assert overview.filled(overview.CHOOSING, tmp_path / "results") != text


def test_the_tables_of_the_starts_are_those_of_their_record(tmp_path: Path) -> None:
    text = overview.MEASURED.read_text()
    assert overview.filled(overview.MEASURED, RESULTS) == text
    record = json.loads((overview.RECORDS / "starts.json").read_text())
    record["tasks"]["pairs"]["starts"]["self"]["size"] = 9.87  # the control
    (tmp_path / "starts.json").write_text(json.dumps(record))
    assert overview.filled(overview.MEASURED, RESULTS, tmp_path) != text


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*/page.html")), ids=lambda page: page.parent.name)
def test_the_page_comes_out_the_same_to_the_byte(page: Path, tmp_path: Path) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    if any(version(name) != pinned[name] for name in ("plotly", "matplotlib", "jinja2")):
        pytest.skip("other versions of plotly, matplotlib or jinja2 than the pinned ones draw otherwise")
    title = re.search(r"<title>(.*?)</title>", page.read_text())
    assert title is not None
    for written in write_report(page.parent, tmp_path, title[1]):
        assert written.read_bytes() == (page.parent / written.relative_to(tmp_path)).read_bytes(), written.name


def test_runs_that_are_compared_are_of_the_same_model() -> None:
    """A pretrained model that was made anew under the same name is another one."""
    records = load_records(RESULTS)
    assert [run["command"] for study in studies(records) for run, _ in strangers(study.runs)] == []
    other = {**records[0], "start": {"loss_before": 1.01 * records[0]["start"]["loss_before"]}, "learning_rate": 1.0}
    assert sum(len(strangers(study.runs)) for study in studies([*records, other])) == 1  # control


def test_every_record_says_where_it_comes_from() -> None:
    for folder in FOLDERS:
        for record in load_records(folder):
            assert record["git"] != "unknown" and record["versions"]["cntlora"]
            assert record["status"] in ("finished", "diverged", "failed")
