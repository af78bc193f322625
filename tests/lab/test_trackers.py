"""Trackers: each real one, offline, is told the curves and the start; no record and no loss depends on that."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import RunFresh
from tests.lab.test_experiments_run import run_of, settings  # noqa: F401, a fixture
from typer.testing import CliRunner

from cntlora.cli.app import app
from cntlora.extras import MissingExtraError
from cntlora.lab.experiments.run import run_one
from cntlora.lab.experiments.settings import from_dict
from cntlora.lab.experiments.sweep import run_sweep
from cntlora.lab.recipes.trackers import TRACKERS, Tracked, check_trackers, tracking
from cntlora.lab.recipes.train_settings import TrainSettings

SWEEP = """
import json
import os
from pathlib import Path
from cntlora.lab.experiments.settings import from_dict
from cntlora.lab.experiments.sweep import run_sweep
if __name__ == "__main__":
    settings, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    run_sweep(from_dict(settings), out)
    values, text = {}, ""
"""
READERS = {
    "tensorboard": """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(out / "tensorboard" / "self-lr0.01-seed0"))
    events.Reload()
    values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (text,) = events.Tensors("train/init_report/text_summary")[0].tensor_proto.string_val
    text = text.decode()
""",
    "wandb": """
    from wandb.proto import wandb_internal_pb2
    (path,) = Path(os.environ["WANDB_DIR"]).glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts, records, ended = path.read_bytes(), 7, b"", [], False
    while at + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB, a header of seven bytes before each part of a record
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, last
            records.append(parts)
            parts = b""
    for one in records:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(one)
        ended |= record.HasField("exit")
        row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        text = row.pop("train/init_report", text)
        for tag, value in row.items():
            if tag != "train/global_step":
                values.setdefault(tag, []).append((row["train/global_step"], value))
    assert ended
""",
    "mlflow": """
    from mlflow import MlflowClient
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert (run.info.run_name, run.info.status) == ("self-lr0.01-seed0", "FINISHED")
    for tag in run.data.metrics:
        values[tag] = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)]
    text = Path(client.download_artifacts(run.info.run_id, "initialisation.txt")).read_text()
""",
    "trackio": """
    import trackio
    from trackio.sqlite_storage import SQLiteStorage
    (run,) = trackio.Api().runs("tiny")
    assert run.name == "self-lr0.01-seed0"
    for row in SQLiteStorage.get_logs("tiny", run.name):
        text = row.pop("train/init_report", text)
        for tag, value in row.items():
            if tag not in ("step", "timestamp", "train/global_step"):
                values.setdefault(tag, []).append((row["train/global_step"], value))
""",
}
TOLD = """
    print("\\n" + json.dumps({"values": values, "text": text}))
"""


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_is_told_the_curves_and_the_start(
    name: str,
    settings: dict[str, Any],  # noqa: F811
    run_fresh: RunFresh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: make test-trackers")
    monkeypatch.chdir(tmp_path)
    for variable, value in (
        ("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("WANDB_SILENT", "true"),
        ("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns"), ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("TRACKIO_DIR", tmp_path / "trackio"), ("HF_HUB_OFFLINE", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(variable, str(value))
    grid = {"methods": ["self"], "learning_rates": [1e-2], "seeds": [0]}
    told = {**settings, "train": {**settings["train"], "report_to": [name]}, "sweep": grid}
    printed = run_fresh(SWEEP + READERS[name] + TOLD, json.dumps(told), tmp_path / "out")
    found = json.loads(printed.splitlines()[-1])
    values, record = found["values"], json.loads((tmp_path / "out" / "self-lr0.01-seed0.json").read_text())
    train, held_out = ("", "eval_") if name == "mlflow" else ("train/", "eval/")
    assert record["status"] == "finished", record
    assert [step for step, _ in values[f"{train}loss"]] == [1, 2, 3, 4]
    assert [value for _, value in values[f"{train}loss"]] == pytest.approx(record["losses"], abs=2e-4)
    assert {f"{train}learning_rate", f"{train}grad_norm"} <= set(values)
    for metric in record["metrics"]:
        expected = [[e["step"], pytest.approx(e[metric], rel=1e-6)] for e in record["evaluations"]]
        assert values[held_out + metric] == expected
    sites = record["sites"].values()
    for key, expected in (
        ("seconds", record["init_seconds"]),
        ("rank_total", sum(site["rank"] for site in sites)),
        ("start_norm_max", max(site["start_norm"] / site["weight_norm"] for site in sites)),
    ):
        assert values[f"{train}init/{key}"] == [[0, pytest.approx(expected, rel=1e-6)]]
    assert "CNTLoRA-S (self)" in found["text"] and "‖s·B·A‖/‖W‖" in found["text"]
    assert all(name in found["text"] for name in record["sites"])
    alone = run_one(run_of(settings, "self"), tmp_path / "alone")
    assert alone["losses"] == record["losses"]  # the control, in this process and without a tracker
    assert alone["config"] == record["config"]


def test_trackers_are_no_part_of_a_record(settings: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    plain, told = run_of(settings, "self"), run_of(settings, "self", train={"report_to": ["wandb", "mlflow"]})
    assert told.experiment.train.report_to == ("wandb", "mlflow") and told.config() == plain.config()
    assert told.config() != run_of(settings, "self", train={"steps": 3}).config()  # the control


def test_a_tracker_that_is_not_known_or_not_installed_is_named_before_any_run(
    settings: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"train.report_to.*'wanb'"):
        TrainSettings(report_to=("wanb",))
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"--report-to wandb needs wandb: pip install 'cntlora\[trackers\]'"):
        check_trackers(["wandb"])
    told = from_dict({**settings, "train": {**settings["train"], "report_to": ["wandb"]}})
    with pytest.raises(MissingExtraError, match="wandb"):
        run_sweep(told, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    check_trackers([])


def test_the_command_takes_trackers_and_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("trial.toml").write_text("[train]\nsteps = 20\n")
    seen = []
    monkeypatch.setattr("cntlora.lab.experiments.sweep.run_sweep", lambda e, out, **_: seen.append((e, out)) or _stop())
    CliRunner().invoke(app, ["run", "trial.toml", "--report-to", "tensorboard, mlflow"])
    CliRunner().invoke(app, ["run", "trial.toml"])
    (told, folder), (plain, other) = seen
    assert told.train == dataclasses.replace(plain.train, report_to=("tensorboard", "mlflow")) and folder == other
    wrong = CliRunner().invoke(app, ["run", "trial.toml", "--report-to", "wanb"])
    assert wrong.exit_code == 1 and "'wanb'" in wrong.stderr and "did you mean 'wandb'" in wrong.stderr


def _stop() -> None:
    raise KeyboardInterrupt


def test_the_environment_is_left_as_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    before = dict(os.environ)
    with tracking([], Tracked("tiny", "a-run", tmp_path)):
        inside = {k: os.environ[k] for k in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TENSORBOARD_LOGGING_DIR")}
    assert [*inside.values()] == ["mine", "tiny", str(tmp_path / "boards" / "a-run")]
    assert dict(os.environ) == before
