"""The table of runs of a study: nothing is lost on the way in and out, and what was damaged or edited is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow", reason="tables of runs need the extra `lab`")
import pandas as pd
import pyarrow.parquet as pq
from tests import report_cases as cases
from typer.testing import CliRunner

from cntlora.cli.app import app
from cntlora.lab.record import SCHEMA, file_name, read_record, write_record
from cntlora.lab.report import load_records, write_report
from cntlora.lab.run_table import flattened, read_table, restored, unpack, write_table

ODD: list[dict[str, Any]] = [
    {"config": None},
    {"config": {}},
    {"config": {"init": None, "lora": {"alpha": 16, "targets": []}}},
    {"config": {"init": {"rtol": 1e-3}, "lora": {"alpha": 16.0, "targets": ["q", "v"]}}},
    {"config": {"task": {"a.b": 1}, "train": {"steps": None}}},
    {"metrics": {}, "error": "half a character \ud83d, a whole one 🦜, a line\nbreak"},
    {"seconds": None, "losses": [None, 0.1 + 0.2, 1e-320]},
    {"trainable_parameters": 2**70, "evaluations": [{"step": 1, "loss": 1.0}, {"step": 2, "accuracy": 0.5}]},
    {"sites": {"a": {"rank": 1}, "b": {"rank": 2, "singular_values": [1.5, None]}}},
    {"sites": {"a.0.q": {"rank": 1, "singular_values": None}, "b": {"rank": 0, "singular_values": [2.0]}}},
    {"samples": [{"step": 0, "kind": "text", "name": "a", "file": None, "text": ""}], "start": {"loss_before": 1}},
]


def odd_records() -> list[dict[str, Any]]:
    """Records of every odd shape, each of another seed."""
    plain = {"schema": SCHEMA, "experiment": "odd", "method": "lora", "learning_rate": 1e-3, "status": "finished"}
    return [{**plain, "seed": seed, **more} for seed, more in enumerate(ODD)]


def sorted_text(records: list[Any]) -> str:
    return json.dumps([{k: v for k, v in record.items() if k != "folder"} for record in records], sort_keys=True)


@pytest.mark.parametrize("records", [cases.many(), odd_records()], ids=["many", "odd"])
def test_what_comes_out_is_what_went_in(records: list[Any], tmp_path: Path) -> None:
    plain = json.loads(json.dumps(records).replace("NaN", "null"))
    write_table(tmp_path / "study.parquet", plain)
    found = read_table(tmp_path / "study.parquet")
    assert sorted_text(found) == sorted_text(plain)
    first = next(i for i, record in enumerate(found) if record.get("losses"))
    found[first]["losses"] = [*found[first]["losses"][:-1], 9.0]  # the control
    assert sorted_text(found) != sorted_text(plain)


def test_a_record_that_a_row_cannot_hold_is_refused(tmp_path: Path) -> None:
    record = odd_records()[0] | {"config": {"lora": {"rank": 8}}}
    write_table(tmp_path / "study.parquet", [record])
    with pytest.raises(ValueError, match=r"other\.parquet: the record of lora cannot be written as a row"):
        write_table(tmp_path / "other.parquet", [record | {"config.lora.rank": 4}])  # the same column twice
    assert not (tmp_path / "other.parquet").exists()


def test_settings_and_curves_are_columns() -> None:
    record = odd_records()[0] | {"config": {"lora": {"rank": 8}}, "sites": {"q.0": {"rank": 3}, "v.0": {"rank": 5}}}
    columns = flattened(record | {"evaluations": [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 0.25}]})
    assert columns["config.lora.rank"] == 8 and columns["evaluations.loss"] == [0.5, 0.25]
    assert columns["sites.name"] == ["q.0", "v.0"] and columns["sites.rank"] == [3, 5]
    assert restored(columns)["sites"] == record["sites"]


def test_pandas_reads_it_without_our_code(tmp_path: Path) -> None:
    write_table(tmp_path / "study.parquet", json.loads(json.dumps(cases.few())))
    frame = pd.read_parquet(tmp_path / "study.parquet")
    best = frame.groupby(["method", "learning_rate"])["mean_loss"].mean()
    runs = [r["mean_loss"] for r in cases.few() if (r["method"], r["learning_rate"]) == ("eva", 0.001)]
    assert best["eva", 0.001] == pytest.approx(sum(runs) / len(runs))
    assert not frame["config.init.adaptive_ranks"][frame["method"] == "eva"].any()


def test_a_damaged_table_is_not_read(tmp_path: Path) -> None:
    """Wherever a byte is changed: it is noticed, or it is one that nothing depends on."""
    path, cut = tmp_path / "study.parquet", tmp_path / "cut.parquet"
    write_table(path, json.loads(json.dumps(cases.few())))
    whole, expected, refused = path.read_bytes(), sorted_text(read_table(path)), 0
    for place in range(0, len(whole), len(whole) // 60):
        cut.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert sorted_text(read_table(cut)) == expected
        except ValueError as error:
            assert "cut.parquet" in str(error)
            refused += 1
    assert refused > 40
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.parquet: cannot be read as a table of runs"):
        read_table(cut)


def test_an_edited_table_is_not_read(tmp_path: Path) -> None:
    write_record(tmp_path / "run.json", odd_records()[3] | {"mean_loss": 0.5})
    path = tmp_path / "study.parquet"
    write_table(path, [read_record(tmp_path / "run.json")])
    table = pq.read_table(path)
    pq.write_table(table, path)
    assert read_table(path)[0]["mean_loss"] == 0.5  # the control: written anew, the same
    place = table.column_names.index("mean_loss")
    edited = table.set_column(place, table.schema.field("mean_loss"), [[0.4]])
    pq.write_table(edited, path)
    with pytest.raises(ValueError, match=r"study\.parquet: the table is not what was saved"):
        read_table(path)
    pq.write_table(edited.replace_schema_metadata(), path)  # by another tool
    with pytest.raises(ValueError, match=r"study\.parquet, row 0: the record is not what was saved"):
        read_table(path)


def test_what_is_no_table_of_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a name that ends in \.parquet"):
        write_table(tmp_path / "study.csv", odd_records())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected at least one record"):
        write_table(tmp_path / "study.parquet", [])
    write_table(tmp_path / "study.parquet", [record | {"schema": 2} for record in odd_records()])  # type: ignore[misc]
    with pytest.raises(ValueError, match="records of schema 2, this cntlora reads 1"):
        read_table(tmp_path / "study.parquet")


class TestCommands:
    def pack(self, folder: Path) -> Path:
        """A folder of records as `cntlora run` writes them, and its table."""
        for record in cases.few():
            write_record(folder / "records" / file_name(record), record)  # type: ignore[arg-type]
        done = CliRunner().invoke(app, ["results", "pack", str(folder / "records"), str(folder / "study.parquet")])
        assert done.exit_code == 0 and "16 runs" in done.stdout
        return folder / "study.parquet"

    def test_a_report_of_the_table_is_that_of_the_folder(self, tmp_path: Path) -> None:
        table = self.pack(tmp_path)
        from_folder = write_report(tmp_path / "records", tmp_path / "a", "T")
        from_table = write_report(table, tmp_path / "b", "T")
        assert [path.name for path in from_folder] == [path.name for path in from_table] and len(from_table) > 4
        for one, other in zip(from_folder, from_table, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name
        done = CliRunner().invoke(app, ["report", str(table), "--out", str(tmp_path / "c")])
        assert done.exit_code == 0 and (tmp_path / "c" / "tables.md").read_bytes() == from_table[2].read_bytes()

    def test_unpacked_records_are_the_files_that_were_packed(self, tmp_path: Path) -> None:
        table = self.pack(tmp_path)
        before = {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()}
        done = CliRunner().invoke(app, ["results", "unpack", str(table), str(tmp_path / "again")])
        assert done.exit_code == 0
        assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
        with pytest.raises(FileExistsError, match=r"is there already; give another folder"):
            unpack(table, tmp_path / "again")

    def test_a_folder_of_tables_is_read_as_one_of_records(self, tmp_path: Path) -> None:
        table = self.pack(tmp_path)
        assert sorted_text(load_records(tmp_path / "records")) == sorted_text(load_records(table))
        with pytest.raises(ValueError, match="are records of the same run"):
            load_records(tmp_path)  # the records and their table

    def test_messages_name_what_is_missing(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["report", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "c")])
        assert done.exit_code == 1 and "none.parquet is no folder; give the folder" in done.stderr
