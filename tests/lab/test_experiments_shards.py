"""Shards: together they are the sweep, apart they run side by side; and the job files of the docs that start them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.lab.test_experiments_sweep import calls, experiment_of, fake_run, graded_run, records_in
from typer.testing import CliRunner

from cntlora.cli.app import app
from cntlora.lab.experiments import shards
from cntlora.lab.experiments.runs import TRIAL, _named, runs_of
from cntlora.lab.experiments.shards import Shard, locked
from cntlora.lab.experiments.sweep import plan_sweep, run_sweep

PAGE = Path(__file__).parents[2] / "docs" / "experiments" / "machines.md"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 16])
def test_every_run_is_in_one_shard(tmp_path: Path, count: int) -> None:
    experiment = experiment_of(tmp_path, seeds=[0, 1, 2])
    parts = [plan_sweep(experiment, tmp_path, shard=Shard(n, count)).pending for n in range(1, count + 1)]
    names = Counter(run.name for part in parts for run in part)
    assert names == Counter(run.name for run in runs_of(experiment)) and set(names.values()) == {1}
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "/4", "a/b", "1/0", "-1/4", "1/4/2", ""])
def test_what_is_no_shard_is_refused_before_any_work(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--shard: expected"):
        Shard.parse(text)
    if text:
        done = CliRunner().invoke(app, ["compare", str(tmp_path / "none.toml"), "--shard", text])
        assert done.exit_code == 1 and done.stderr.startswith("cntlora: --shard: expected")
    assert str(Shard.parse(" 3 / 16 ")) == "3/16"


def test_shards_fill_one_folder_and_the_sweep_finds_all(tmp_path: Path) -> None:
    experiment, out = experiment_of(tmp_path, seeds=[0, 1]), tmp_path / "out"
    for number in (1, 2, 3):
        sweep = run_sweep(experiment, out, jobs=2, run=fake_run, shard=Shard(number, 3))
        assert sweep.total == len(sweep.records) == len(Shard(number, 3).of(range(8))) and not sweep.later
    again = run_sweep(experiment, out, run=fake_run, shard=Shard(1, 3))
    assert again.total == 0 and len(again.present) == 3
    whole = run_sweep(experiment, out, run=fake_run)
    assert whole.total == 0 and len(whole.present) == 8 and set(calls(tmp_path).values()) == {1}


@pytest.mark.slow
def test_the_shards_of_a_trial_are_one_sweep(tmp_path: Path) -> None:
    """Each process makes the tiny model anew, in a folder of another name."""
    (tmp_path / "trial.toml").write_text('[sweep]\nmethods = ["lora", "self"]\n')
    command = ["compare", str(tmp_path / "trial.toml"), "--smoke", "--jobs", "1", "--out", str(tmp_path / "out")]
    for more, printed in ((["--shard", "1/2"], "1 finished"), (["--shard", "2/2"], "1 finished"), ([], "2 were there")):
        done = CliRunner().invoke(app, command + more)
        assert done.exit_code == 0 and printed in done.output, done.output
    assert len(list((tmp_path / "out").glob("*.json"))) == 2


def test_only_the_folder_of_a_trial_is_no_part_of_a_run() -> None:
    one, same, other = (_named(f"/tmp/{folder}/model") for folder in (f"{TRIAL}1", f"{TRIAL}2", "mine"))
    assert one == same != other and other != _named("/tmp/yours/model")  # the control


def test_shards_run_beside_each_other_and_beside_nothing_else(tmp_path: Path) -> None:
    experiment, out = experiment_of(tmp_path, methods=["lora"], learning_rates=[1e-3, 1e-2]), tmp_path / "out"
    with locked(out, Shard(1, 2)):
        for shard in (Shard(1, 2), None):
            with pytest.raises(RuntimeError, match="another sweep is running there"):
                run_sweep(experiment, out, run=fake_run, shard=shard)
        unfinished = out / ".lora-lr0.001-seed0.json.abcdefgh.cntlora"  # of the first shard
        unfinished.write_text("{")
        assert run_sweep(experiment, out, run=fake_run, shard=Shard(2, 2)).total == 1  # the control
        assert unfinished.exists()
    with locked(out), pytest.raises(RuntimeError, match="another sweep is running there"):
        run_sweep(experiment, out, run=fake_run, shard=Shard(1, 2))
    assert run_sweep(experiment, out, run=fake_run).total == 1 and not unfinished.exists()


def test_a_file_system_without_locks_is_no_other_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(shards.fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path, Shard(1, 2)):
        pass


def test_the_other_seeds_of_a_shard_wait_for_the_first_seed_of_all(tmp_path: Path) -> None:
    grid = {"learning_rates": [1e-3, 3e-3, 1e-2], "seeds": [0, 1, 2], "best": 1}
    experiment, out = experiment_of(tmp_path, **grid), tmp_path / "out"
    first = [run_sweep(experiment, out, run=graded_run, shard=Shard(n, 2)) for n in (1, 2)]
    assert first[0].later == 2 and len(first[0].records) == 3  # the rates of the other shard are not there yet
    assert first[1].later == 0 and len(records_in(out)) < 10
    run_sweep(experiment, out, run=graded_run, shard=Shard(1, 2))
    whole = run_sweep(experiment, out, run=graded_run)
    assert whole.total == 0 and len(whole.present) == 10 and set(calls(tmp_path).values()) == {1}


# --- the job files of the docs ----------------------------------------------------------------------------------


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found


def started_by(script: str, folder: Path, **variables: str) -> list[str]:
    """The arguments of `cntlora` in a shell script, in which srun runs what it is given."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", 'exec "$@"'), ("cntlora", 'printf "%s\\n" "$@"')):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def slurm_jobs(folder: Path) -> list[list[str]]:
    script = block("bash")
    first, last = map(int, re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", script, re.MULTILINE)[0])
    return [started_by(script, folder, SLURM_ARRAY_TASK_ID=str(n)) for n in range(first, last + 1)]


def kubernetes_jobs(folder: Path) -> list[list[str]]:
    job = yaml.safe_load(block("yaml"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] <= spec["completions"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # which backoffLimitPerIndex needs
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    program, flag, script = *container["command"], *container["args"]
    assert (program, flag) == ("bash", "-c")
    return [started_by(script, folder, JOB_COMPLETION_INDEX=str(n)) for n in range(spec["completions"])]


@pytest.mark.parametrize("jobs", [slurm_jobs, kubernetes_jobs])
def test_the_jobs_of_the_docs_are_the_whole_sweep(jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reviews.toml").write_text("[sweep]\nlearning_rates = [1e-3, 2e-3, 3e-3]\nseeds = [0, 1, 2, 3]\n")
    pending: list[str] = []
    for arguments in jobs(tmp_path):
        at = arguments.index("--out") + 1
        listed = [*arguments[:at], str(tmp_path / "out"), *arguments[at + 1 :], "--dry-run"]
        done = CliRunner().invoke(app, listed)
        assert done.exit_code == 0, (shlex.join(listed), done.output)
        pending += re.findall(r"^to run +(\S+)$", done.stdout, re.MULTILINE)
    assert len(pending) == len(set(pending)) == 24
