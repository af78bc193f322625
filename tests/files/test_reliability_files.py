"""Files that are damaged, newer, or no plan at all are refused with the reason; a full disk costs nothing."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bad_inputs import WRONG, is_clear, refusals
from tests.damage_cases import (
    cuts,
    flips,
    newer,
    plan_bytes,
    read_plan,
    record_bytes,
    record_reader,
    refusal,
    with_head,
)
from tests.disk_cases import contents, fill, no_longer_files_than, refused, small_disk, writers

from cntlora import InitPlan
from cntlora.lab.experiments.runs import failed, without_places
from cntlora.lab.record import read_record, write_record
from cntlora.lab.report import load_records

SOURCE = Path(__file__).parents[2] / "src" / "cntlora"


@pytest.fixture(scope="module")
def plan() -> bytes:
    return plan_bytes()


def test_a_plan_that_is_cut_anywhere_is_refused(plan: bytes) -> None:
    assert refusal(read_plan, plan) is None  # the control
    reasons = [refusal(read_plan, part) for part in cuts(plan, 300)]
    assert all(reason and "cut short" in reason for reason in reasons)


def test_a_plan_with_any_bit_flipped_is_refused(plan: bytes) -> None:
    reasons = [refusal(read_plan, changed) for changed in flips(plan, 600)]
    assert all(reasons)
    assert any("digests differ" in str(reason) for reason in reasons)


def test_an_edited_number_in_the_header_is_refused(plan: bytes) -> None:
    for edit in (
        lambda head: next(iter(head["sites"].values())).update(scaling=3.0),
        lambda head: head["config"].update(base="keep"),
        lambda head: head.update(batches=99),
    ):
        assert "header is not what was saved" in str(refusal(read_plan, with_head(plan, edit)))


def test_a_newer_plan_says_to_update_and_an_older_one_to_make_it_again(plan: bytes) -> None:
    assert "update cntlora" in str(refusal(read_plan, newer(plan)))
    older = with_head(plan, lambda head: head.update(format=3))
    assert "plan format 3" in str(refusal(read_plan, older)) and "make the plan again" in str(refusal(read_plan, older))
    assert "plan format None" in str(refusal(read_plan, with_head(plan, lambda head: head.pop("format"))))


@pytest.mark.parametrize("key", ["config", "sites", "digests", "memory"])
def test_a_head_with_right_digests_that_lacks_something_is_refused(plan: bytes, key: str) -> None:
    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    assert refusal(read_plan, with_head(plan, lambda head: head, digest)) is None  # the control
    lacking = with_head(plan, lambda head: head.pop(key), digest)
    assert "no plan as this cntlora writes it" in str(refusal(read_plan, lacking))


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    with pytest.raises(SystemExit, match="a pickle was loaded"):
        pickle.loads(pickle.dumps(Trap()))  # the control
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        InitPlan.load(path)
    torch.save({"A": Trap()}, path)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        InitPlan.load(path)


def test_no_source_file_loads_pickles() -> None:
    """`torch.load` is there for weights alone, whose reader makes nothing but tensors."""
    loads = re.compile(r"\bpickle\b.*load|torch\.load\((?!.*weights_only=True)|allow_pickle=True|joblib|shelve|marshal")
    assert loads.search("torch.load(path)") and not loads.search("torch.load(path, weights_only=True)")
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    assert len(texts) > 80
    assert not [path for path, text in texts.items() if loads.search(text)]


# --- records ------------------------------------------------------------------------------------------------


def test_a_record_that_is_cut_or_changed_anywhere_is_refused(tmp_path: Path) -> None:
    data, read = record_bytes(tmp_path), record_reader(tmp_path)
    whole = json.loads(data)
    assert refusal(read, data) is None and refusal(read, data[:-1]) is None  # all but the last line feed
    for n in range(0, len(data) - 1, 3):
        assert refusal(read, data[:n]), n
    for changed in flips(data, 300):
        if refusal(read, changed) is None:  # the key of the digest itself: all that was written is there
            kept = {k: v for k, v in json.loads(changed).items() if k in whole}
            assert kept == {k: v for k, v in whole.items() if k in kept} and len(kept) >= len(whole) - 1


def test_a_newer_record_says_to_update(tmp_path: Path) -> None:
    record = {**json.loads(record_bytes(tmp_path)), "schema": 2}
    assert "update cntlora" in str(refusal(record_reader(tmp_path), json.dumps(record).encode()))


def test_an_edited_number_of_a_record_is_noticed(tmp_path: Path) -> None:
    record = json.loads(record_bytes(tmp_path))
    record["losses"][0] = 0.5
    read = record_reader(tmp_path)
    assert "digest differs" in str(refusal(read, json.dumps(record).encode()))
    del record["digest"]  # those of before there was a digest
    assert refusal(read, json.dumps(record).encode()) is None


def test_a_written_record_is_read_whatever_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, {"schema": 1, "a": float("nan"), "b": (1, 2.5e-17), "c": "\ud83d\ude00 ü\n", 3: {"d": None}})
    assert read_record(path)["a"] is None and read_record(path)["3"] == {"d": None}


def test_folders_of_this_machine_stay_out_of_tracebacks() -> None:
    try:
        torch.ones(2) @ torch.ones(3)
        raise RuntimeError(f"cannot read {Path.home()}/data/mine.csv")
    except RuntimeError:
        told = traceback.format_exc()
    kept = without_places(told)
    assert str(Path(__file__).parent) in told and str(Path(__file__).parent) not in kept
    assert "test_reliability_files.py" in kept and "line" in kept


# --- a full disk --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_writer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return writers(tmp_path_factory.mktemp("read"))


def test_a_file_that_may_not_grow_is_one_error_and_nothing_is_left(every_writer: Any, tmp_path: Path) -> None:
    for write in every_writer.values():
        with no_longer_files_than(3000):
            assert str(tmp_path) in refused(write, tmp_path)
    assert not contents(tmp_path) and len(every_writer) >= 5


def test_a_full_disk_is_one_error_and_the_old_files_stay(every_writer: Any, tmp_path: Path) -> None:
    some = [write for what, write in every_writer.items() if "report" not in what]
    try:
        with small_disk(tmp_path / "disk", "8m") as disk:
            for write in some:
                write(disk)
            fill(disk)
            for write in some:
                assert "No space left" in refused(write, disk)
            (disk / "filler").unlink()
            for write in some:
                write(disk)  # the control: with room it works
    except PermissionError as error:
        pytest.skip(str(error))


# --- what users get wrong -----------------------------------------------------------------------------------


def test_every_mistake_is_one_clear_error() -> None:
    found = {what: (kind, message) for what, kind, message in refusals()}
    assert len(found) == len(WRONG) >= 25
    assert not {what: told for what, told in found.items() if not is_clear(*told)}


def test_failed_records_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    from tests.lab.test_experiments_sweep import experiment_of

    from cntlora.lab.experiments.runs import Run

    run = Run(experiment_of(tmp_path, methods=["self"]), "self", 1e-3, 0)
    record = failed(run, {}, f"OSError: {tmp_path}/x.csv", f'File "{__file__}", line 3')
    assert "x.csv" in record["error"] and str(Path(__file__).parent) not in record["traceback"]
    write_record(tmp_path / "records" / "r.json", record)
    assert len(load_records(tmp_path / "records")) == 1
