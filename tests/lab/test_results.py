"""Published pages equal what the tables of runs in studies/ give, byte for byte."""

from __future__ import annotations

import hashlib
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("plotly", reason="the page needs the extra `lab`")
pytest.importorskip("pyarrow", reason="tables of runs need the extra `lab`")
from benchmarks import overview
from benchmarks.machine import RESULTS as RECORDS

from cntlora.lab.record import RunRecord, check_digest
from cntlora.lab.report import load_records, studies, write_report
from cntlora.lab.report.other_models import runs_of_other_models
from cntlora.lab.report.page import build_page
from cntlora.lab.report.tables import brief_tables
from cntlora.lab.run_table import write_table

ROOT = Path(__file__).parents[2]
TABLES = sorted(overview.RUNS.glob("*.parquet"))
CHECKSUMS = dict(reversed(line.split("  ")) for line in (ROOT / "studies" / "checksums.txt").read_text().splitlines())
"""SHA-256 of every table and figure, made from the JSON records before they were packed."""
pytestmark = pytest.mark.published


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def edited(table: Path, folder: Path, method: str, rate: float | None = None) -> Path:
    """A copy of a table in which the first run of a method (at a learning rate) has another mean loss: the control."""
    records = load_records(table)
    place = next(i for i, r in enumerate(records) if r["method"] == method and rate in (None, r["learning_rate"]))
    changed: RunRecord = {**records[place], "mean_loss": 0.1}
    changed.pop("digest", None)  # which would refuse what was edited
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / table.name, [*records[:place], changed, *records[place + 1 :]])
    return folder / table.name


def test_there_are_results() -> None:
    assert {"tweets", "tweets_100"} <= {table.stem for table in TABLES}
    assert {name.partition("/")[0] for name in CHECKSUMS if "/" in name} == {table.stem for table in TABLES}


def test_every_record_names_the_command_that_makes_it_again() -> None:
    for record in load_records(overview.RUNS):
        file = f"{record['experiment']}.toml"
        grid = f"--methods {record['method']} --learning-rates {record['learning_rate']:g} --seeds {record['seed']}"
        # studies/ was called experiments/ when most of them were made
        assert record["command"].replace("experiments/", "studies/") == f"cntlora compare studies/{file} {grid}"
        assert (ROOT / "studies" / file).is_file()


def test_every_record_is_as_its_run_wrote_it() -> None:
    """By the digest of its own file, which was made when the run ended."""
    records = [record for table in TABLES for record in load_records(table)]
    with_digest = [record for record in records if "digest" in record]
    assert len(with_digest) > 0.5 * len(records)
    for record in with_digest:
        check_digest("", record, "")
    with pytest.raises(ValueError, match="its digest differs"):
        check_digest("", {**with_digest[0], "seed": 99}, "")  # control


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_tables_are_those_of_the_records_before_they_were_packed(table: Path, tmp_path: Path) -> None:
    write_report(table, tmp_path, figures=None)
    for name in ("tables.md", "tables.txt", "tables.tex"):
        assert checksum((tmp_path / name).read_bytes()) == CHECKSUMS[f"{table.stem}/{name}"], name
    brief = "\n".join(t.to_markdown() for study in studies(load_records(table)) for t in brief_tables(study, None))
    assert checksum(brief.encode()) == CHECKSUMS[f"{table.stem}/brief.md"]
    write_report(edited(table, tmp_path / "runs", "lora"), tmp_path, figures=None)
    assert checksum((tmp_path / "tables.md").read_bytes()) != CHECKSUMS[f"{table.stem}/tables.md"]


def test_overviews_are_those_of_the_records_before_they_were_packed(tmp_path: Path) -> None:
    made = {"comparison.md": overview.comparison(overview.RUNS), "halves.md": overview.halves(overview.RUNS)}
    made |= {"starts.md": overview.starts(RECORDS / "starts.json")}
    made = {name: text.replace("emoji images", "emoji pictures") for name, text in made.items()}  # a row's former name
    assert {name: checksum(text.encode()) for name, text in made.items()} == {n: CHECKSUMS[n] for n in made}
    shutil.copytree(overview.RUNS, tmp_path / "runs")
    edited(overview.RUNS / "pairs.parquet", tmp_path / "runs", "descent", 0.001)
    assert checksum(overview.comparison(tmp_path / "runs").encode()) != CHECKSUMS["comparison.md"]


def test_the_tables_of_the_advice_are_those_of_the_records(tmp_path: Path) -> None:
    text = overview.EVIDENCE.read_text()
    assert overview.filled(overview.EVIDENCE, overview.RUNS) == text
    shutil.copytree(overview.RUNS, tmp_path / "runs")  # the control: one changed record changes the tables
    edited(overview.RUNS / "pairs.parquet", tmp_path / "runs", "descent", 0.001)
    assert overview.filled(overview.EVIDENCE, tmp_path / "runs") != text


@pytest.mark.parametrize("study", sorted({n.partition("/")[0] for n in CHECKSUMS if n.endswith(".svg")}))
def test_figures_are_those_of_the_records_before_they_were_packed(study: str, tmp_path: Path) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    if any(version(name) != pinned[name] for name in ("plotly", "matplotlib", "jinja2")):
        pytest.skip("other versions of plotly, matplotlib or jinja2 than the pinned ones draw otherwise")
    table = overview.RUNS / f"{study}.parquet"
    drawn = [path for path in write_report(table, tmp_path) if path.suffix == ".svg"]
    assert len(drawn) == 6
    for path in drawn:
        assert checksum(path.read_bytes()) == CHECKSUMS[f"{study}/{path.relative_to(tmp_path)}"], path.name
    # nothing of the page depends on when or where it is made
    assert (tmp_path / "page.html").read_text() == build_page(load_records(table))


def test_runs_that_are_compared_are_of_the_same_model() -> None:
    """A pretrained model that was made anew under the same name is another one."""
    records = load_records(overview.RUNS)
    assert [run["command"] for study in studies(records) for run, _ in runs_of_other_models(study.runs)] == []
    other = {**records[0], "start": {"loss_before": 1.01 * records[0]["start"]["loss_before"]}, "learning_rate": 1.0}
    assert sum(len(runs_of_other_models(study.runs)) for study in studies([*records, other])) == 1  # control


def test_every_record_says_where_it_comes_from() -> None:
    for table in TABLES:
        for record in load_records(table):
            assert record["git"] != "unknown" and record["versions"]["cntlora"]
            assert record["status"] in ("finished", "diverged", "failed")


def test_the_repository_holds_tables_of_runs_and_no_folders_of_records() -> None:
    files = [path for path in (ROOT / "studies").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".toml", ".parquet", ".webp", ".txt", ".md", ".py"}
    assert sum(path.stat().st_size for path in files) < 10 * 2**20
