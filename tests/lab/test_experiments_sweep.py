"""Sweeps with runs that cost nothing: going on, failures, SIGKILL, changed settings, the lock, Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cntlora.atomic import remove_leftovers
from cntlora.lab.experiments import processes
from cntlora.lab.experiments.environment import machine
from cntlora.lab.experiments.runs import Run, failed, frame, path_of
from cntlora.lab.experiments.settings import Experiment, from_dict, replaced
from cntlora.lab.experiments.shards import locked
from cntlora.lab.experiments.sweep import Sweep, plan_sweep, run_sweep
from cntlora.lab.record import write_record
from cntlora.methods.method import METHODS

RATES = [1e-3, 1e-2]


def fake_run(run: Run, out: Path) -> dict[str, Any]:
    """A run in no time. `title` is the file that counts the calls; some seeds end badly."""
    with Path(run.experiment.title).open("a") as log:
        log.write(f"{run.name} {os.getpid()}\n")
    if run.seed == 11:
        raise ValueError("no such\nthing")
    if run.seed == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    if run.seed == 13:
        os._exit(3)
    if run.seed == 20:
        time.sleep(60)
    losses = [float("nan"), *[1.0] * 100]
    return {**frame(run, machine()), "status": "finished", "mean_loss": 1.0, "losses": losses}


def slow_run(run: Run, out: Path) -> dict[str, Any]:
    """Stand in as `fake_run`, long enough to be interrupted, with a record that takes long to write."""
    time.sleep(0.1)
    return {**fake_run(run, out), "losses": [0.123456789] * 100_000}


def experiment_of(folder: Path, **sweep: Any) -> Experiment:
    sweep = {"methods": ["lora", "self"], "learning_rates": RATES, "seeds": [0], **sweep}
    return from_dict({"name": "trial", "title": str(folder / "log"), "sweep": sweep})


def calls(folder: Path) -> Counter[str]:
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return Counter(line.split()[0] for line in lines)


def records_in(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def test_the_index_of_each_class_is_said_before_the_first_run(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("text,label\n" + "t,good\nu,bad\n" * 4)
    experiment, said = experiment_of(tmp_path, methods=["lora"], learning_rates=[1e-3]), []
    task = dataclasses.replace(experiment.task, data=str(tmp_path / "mine.csv"), eval_size=2)
    own = dataclasses.replace(experiment, task=task)
    run_sweep(own, tmp_path / "out", run=fake_run, say=said.append, listener=lambda *_: said.append("a run"))
    assert said == ["classes: 0 = bad, 1 = good (3, 3 rows); 2 rows held out", "a run"]
    run_sweep(own, tmp_path / "out", run=fake_run, say=said.append)  # all is there: nothing is read
    assert len(said) == 2


def test_every_run_gets_a_record_and_none_is_repeated(tmp_path: Path) -> None:
    experiment, out, heard = experiment_of(tmp_path), tmp_path / "out", []
    sweep = run_sweep(experiment, out, jobs=2, run=fake_run, listener=lambda s, r: heard.append((len(s.records), r)))
    found = records_in(out)
    assert len(found) == sweep.total == sweep.count("finished") == 4 and set(calls(tmp_path).values()) == {1}
    assert [n for n, _ in heard] == list(range(1, 5)) and sweep.remaining == 0
    assert found["self-lr0.01-seed0"]["method"] == "self" and found["self-lr0.01-seed0"]["losses"][0] is None
    again = run_sweep(experiment, out, run=fake_run)
    assert again.total == 0 and len(again.present) == 4 and calls(tmp_path).total() == 4
    more = run_sweep(replaced(experiment, seeds=[0, 1]), out, run=fake_run)
    assert more.total == 4 and calls(tmp_path).total() == 8  # the control: what is new does run


def graded_run(run: Run, out: Path) -> dict[str, Any]:
    """Stand in as `fake_run`, with a loss that depends on the learning rate, and on the method which one is best."""
    best = {"lora": 3e-3, "self": 1e-2}.get(run.method, 1e-3)
    loss = abs(run.learning_rate - best) if run.seed == 0 else 1.0
    diverged = run.method == "self" and run.learning_rate == 1e-2
    return {**fake_run(run, out), "mean_loss": None if diverged else loss}


def test_the_other_seeds_run_at_the_best_rates_of_the_first(tmp_path: Path) -> None:
    grid = {"learning_rates": [1e-3, 3e-3, 1e-2], "seeds": [0, 1, 2], "best": 1}
    experiment, out, totals = experiment_of(tmp_path, **grid), tmp_path / "out", []
    first = plan_sweep(experiment, out)
    assert {run.seed for run in first.pending} == {0} and len(first.pending) == 6 and first.later == 4
    sweep = run_sweep(experiment, out, jobs=2, run=graded_run, listener=lambda s, _: totals.append(s.total))
    later = {name for name in calls(tmp_path) if not name.endswith("seed0")}
    best = ["lora-lr0.003", "self-lr0.003"]  # of self 1e-2 has no loss
    assert later == {f"{name}-seed{seed}" for name in best for seed in (1, 2)}
    assert calls(tmp_path).total() == len(sweep.records) == sweep.total == 10 and set(totals) == {10}
    again = run_sweep(experiment, out, run=graded_run)
    assert again.total == 0 and len(again.present) == 10
    two = replace(experiment, sweep=replace(experiment.sweep, best=2))
    assert {run.name for run in plan_sweep(two, out).pending} == {
        f"{name}-lr0.001-seed{seed}" for name in ("lora", "self") for seed in (1, 2)
    }
    whole = replace(experiment, sweep=replace(experiment.sweep, best=0))
    assert len(plan_sweep(whole, out).pending) == 8  # the control


def test_what_fails_in_the_first_round_neither_ends_a_sweep_nor_runs_twice(tmp_path: Path) -> None:
    grid = {"methods": ["self"], "learning_rates": RATES, "seeds": [11, 12], "best": 1}
    sweep = run_sweep(experiment_of(tmp_path, **grid), tmp_path / "out", run=fake_run, retry_failed=True)
    assert sweep.count("failed") == 2 and calls(tmp_path).total() == 2


def test_every_run_has_a_process_of_its_own(tmp_path: Path) -> None:
    run_sweep(experiment_of(tmp_path), tmp_path / "out", run=fake_run)
    pids = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(set(pids)) == 4 and str(os.getpid()) not in pids


@pytest.mark.parametrize(
    ("seed", "error", "traced"),
    [(11, "ValueError: no such thing", True), (12, "SIGKILL", False), (13, "exit code 3", False)],
)
def test_a_failed_run_is_recorded_and_the_sweep_goes_on(tmp_path: Path, seed: int, error: str, traced: bool) -> None:
    experiment = experiment_of(tmp_path, methods=["self"], learning_rates=[1e-3], seeds=[0, seed, 21])
    sweep = run_sweep(experiment, tmp_path / "out", run=fake_run)
    record = records_in(tmp_path / "out")[f"self-lr0.001-seed{seed}"]
    assert (sweep.count("finished"), sweep.count("failed")) == (2, 1)
    assert record["status"] == "failed" and error in record["error"] and "\n" not in record["error"]
    assert ("fake_run" in record.get("traceback", "")) == traced
    assert record["mean_loss"] is None and record["losses"] == [] and record["config"]["init"]["method"] == "self"
    run_sweep(experiment, tmp_path / "out", run=fake_run)
    assert calls(tmp_path).total() == 3  # what failed is not tried again unasked
    run_sweep(experiment, tmp_path / "out", run=fake_run, retry_failed=True)
    assert calls(tmp_path)[f"self-lr0.001-seed{seed}"] == 2 and calls(tmp_path).total() == 4


def test_a_failure_replaces_what_failed_before(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, methods=["self"], learning_rates=[1e-3], seeds=[12])
    run = Run(experiment, "self", 1e-3, 12)
    write_record(path_of(tmp_path, run), failed(run, machine(), "an old reason"))
    run_sweep(experiment, tmp_path, run=fake_run, retry_failed=True)
    assert "SIGKILL" in records_in(tmp_path)[run.name]["error"]


def test_changed_settings_are_an_error_that_names_file_and_key(tmp_path: Path) -> None:
    experiment, out = experiment_of(tmp_path, seeds=[0]), tmp_path / "out"
    run_sweep(experiment, out, run=fake_run)
    before = {path: path.read_bytes() for path in out.glob("*.json")}
    changed = replace(experiment, lora=replace(experiment.lora, rank=4))
    with pytest.raises(ValueError, match=r"lora-lr0.001-seed0.json: lora.rank is 8 there and 4 in the experiment"):
        run_sweep(changed, out, run=fake_run)
    with pytest.raises(ValueError, match=r"self-.*json: init.num_batches is 8 there and 3"):
        plan_sweep(replace(experiment, init={"num_batches": 3}), out)
    assert {path: path.read_bytes() for path in out.glob("*.json")} == before and calls(tmp_path).total() == 4
    run_sweep(changed, out, run=fake_run, replace=True)
    assert all(record["config"]["lora"]["rank"] == 4 for record in records_in(out).values())


def test_an_edited_function_is_no_longer_the_method_of_its_record(tmp_path: Path) -> None:
    file, out = tmp_path / "starts.py", tmp_path / "out"
    file.write_text("def whole(W):\n    return W\n")
    experiment = experiment_of(tmp_path, methods=["lora", f"{file}:whole"], learning_rates=[1e-3])
    run_sweep(experiment, out, run=fake_run)
    (name,) = set(records_in(out)) - {"lora-lr0.001-seed0"}
    record = records_in(out)[name]
    assert name.endswith("-starts.py-whole-lr0.001-seed0") and record["label"] == "whole"
    assert not plan_sweep(experiment, out).pending
    METHODS.pop(f"{file}:whole")  # as in another process
    assert not plan_sweep(experiment, out).pending
    METHODS.pop(f"{file}:whole")
    file.write_text("def whole(W):\n    return -W\n")
    with pytest.raises(ValueError, match=r"init\.code is .* there and"):
        plan_sweep(experiment, out)
    METHODS.pop(f"{file}:whole")


def test_an_option_that_is_newer_than_the_record_is_no_change(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, methods=["self"], learning_rates=[1e-3], seeds=[0])
    run = Run(experiment, "self", 1e-3, 0)
    record = frame(run, machine())
    del record["config"]["init"]["strength"], record["config"]["lora"]["dropout"]
    write_record(path_of(tmp_path, run), record)
    assert not plan_sweep(experiment, tmp_path).pending
    with pytest.raises(ValueError, match="init.strength is missing there and 3.0"):
        plan_sweep(replace(experiment, init={"strength": 3.0}), tmp_path)


@pytest.mark.parametrize("content", ["", '{"schema": 1', "[]", '{"arm": "self", "seed": 0}'])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: str) -> None:
    experiment = experiment_of(tmp_path, methods=["self"], learning_rates=[1e-3], seeds=[0])
    path = path_of(tmp_path, Run(experiment, "self", 1e-3, 0))
    path.write_text(content)
    with pytest.raises(ValueError, match=r"self-lr0.001-seed0.json.*--replace"):
        plan_sweep(experiment, tmp_path)
    assert path.read_text() == content
    assert len(plan_sweep(experiment, tmp_path, replace=True).pending) == 1


def test_leftovers_are_told_from_records(tmp_path: Path) -> None:
    names = [".self-lr0.001-seed0.json.ab12_xyz.cntlora", "self-lr0.001-seed0.json", ".notes.json", "notes.json.bak"]
    for name in names:
        (tmp_path / name).write_text("{")
    assert remove_leftovers(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path)
    with locked(tmp_path / "out"):
        with pytest.raises(RuntimeError, match="another sweep is running there"):
            run_sweep(experiment, tmp_path / "out", run=fake_run)
    assert calls(tmp_path).total() == 0
    assert run_sweep(experiment, tmp_path / "out", run=fake_run).total == 4  # the lock is free again


def test_the_users_data_is_checked_before_any_run(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text,stars\ngood,5\n")
    task = {"name": "tweets", "data": str(tmp_path / "texts.csv")}
    experiment = from_dict({**experiment_of(tmp_path).to_dict(), "task": task})
    with pytest.raises(ValueError, match="label"):
        run_sweep(experiment, tmp_path / "out", run=fake_run)
    assert calls(tmp_path).total() == 0 and not list((tmp_path / "out").glob("*.json"))


def kept_run(run: Run, out: Path) -> dict[str, Any]:
    return {**fake_run(run, out), "error": f"{run.save_adapter} {out.name}"}


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_knows_its_folder_and_whether_to_keep_the_adapter(tmp_path: Path, kept: bool) -> None:
    experiment = experiment_of(tmp_path, methods=["self"], learning_rates=[1e-3])
    sweep = run_sweep(experiment, tmp_path / "out", run=kept_run, save_adapters=kept)
    assert sweep.records[0]["error"] == f"{kept} out"
    assert not plan_sweep(experiment, tmp_path / "out").pending  # it is no setting of the record


def test_a_limit_on_threads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    for limit, cores in (("2", 2), ("64", 6), ("", 6), ("0", 6), ("4,2", 6)):
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
        assert processes.cores() == cores


def test_jobs_under_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs: expected at least 1"):
        run_sweep(experiment_of(tmp_path), tmp_path / "out", jobs=0, run=fake_run)


SCRIPT = """
import sys
from pathlib import Path
from tests.lab import test_experiments_sweep as t
if __name__ == "__main__":
    folder, function, seeds = Path(sys.argv[1]), getattr(t, sys.argv[2]), [int(s) for s in sys.argv[3].split(",")]
    try:
        t.run_sweep(t.experiment_of(folder, seeds=seeds), folder / "out", jobs=2, run=function)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@contextmanager
def started(folder: Path, function: str, seeds: str) -> Iterator[subprocess.Popen[bytes]]:
    """A sweep in a process of its own, which hears Ctrl-C also where the tests are a background job that does not."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), function, seeds],
        env={**os.environ, "PYTHONPATH": str(root)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def alive(folder: Path) -> list[int]:
    """Processes of runs that still exist."""
    pids = [int(line.split()[1]) for line in (folder / "log").read_text().splitlines()]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_after_sigkill_nothing_is_lost_half_or_repeated(tmp_path: Path) -> None:
    out, seeds = tmp_path / "out", "0,1,2"
    with started(tmp_path, "slow_run", seeds) as process:
        wait_until(lambda: len(list(out.glob("*.json"))) >= 3)
        process.kill()
        process.wait()
        wait_until(lambda: not alive(tmp_path), 60)  # no run goes on without its sweep
    before = {path.stem: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 3 <= len(before) < 12
    assert all(
        record["status"] == "finished" and len(record["losses"]) == 100_000 for record in records_in(out).values()
    )
    (out / ".self-lr0.001-seed0.json.abcdefgh.cntlora").write_text('{"half": ')
    sweep = run_sweep(experiment_of(tmp_path, seeds=[0, 1, 2]), out, jobs=2, run=slow_run)
    after = {path.stem: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert len(after) == 12 and sweep.total == 12 - len(before)
    assert {name: after[name] for name in before} == before
    assert all(calls(tmp_path)[name] == 1 for name in before)
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".json") == []


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_ctrl_c_ends_promptly_and_keeps_what_is_finished(tmp_path: Path) -> None:
    with started(tmp_path, "fake_run", "0,20") as process:
        wait_until(lambda: sum(count for name, count in calls(tmp_path).items() if "seed20" in name) == 2)
        assert len(alive(tmp_path)) >= 2  # two runs of a minute
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert not alive(tmp_path)
    assert len(records_in(tmp_path / "out")) == 4
    assert all(record["status"] == "finished" for record in records_in(tmp_path / "out").values())


def test_the_time_to_go_does_not_count_the_imports_of_the_start() -> None:
    """Two side by side of six: by the runs' own seconds first, then by the pace since both of the first had ended."""
    sweep = Sweep(6, [], 2, began=0.0)
    record: Any = {"init_seconds": 1.0, "train_seconds": 3.0}
    sweep.records += [record]
    sweep.ended += [1000.0]
    assert sweep.remaining == pytest.approx(4.0 * 5 / 2)
    now = time.perf_counter()
    sweep.records += [record] * 3
    sweep.ended[:] = [now - 21.0, now - 20.0, now - 10.0, now]
    assert sweep.remaining == pytest.approx(20.0 / 2 * 2, abs=1.0)
