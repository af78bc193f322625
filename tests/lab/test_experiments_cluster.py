"""A sweep on a real Ray cluster: workers, driver and nodes that go, Ctrl-C; nothing is lost and nothing runs twice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.lab.test_experiments_sweep import calls, experiment_of, fake_run, records_in, wait_until
from typer.testing import CliRunner

from cntlora.cli.app import app
from cntlora.lab.experiments import cluster as cluster_module
from cntlora.lab.experiments.cluster import Cluster
from cntlora.lab.experiments.runs import Run
from cntlora.lab.experiments.sweep import run_sweep

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")

ROOT = Path(__file__).parents[2]
ONE = {"methods": ["self"], "learning_rates": [1e-3]}


def placed_run(run: Run, out: Path) -> dict[str, Any]:
    """Do as `fake_run`; `error` says where. Seed 31 is killed at its first try, seed 40 and above take a while."""
    before = calls(Path(run.experiment.title).parent)[run.name]
    record = fake_run(run, out)
    if run.seed == 31 and not before:
        os.kill(os.getpid(), signal.SIGKILL)
    if run.seed >= 40:
        time.sleep(3)
    return {**record, "error": f"{ray.get_runtime_context().get_node_id()} {os.environ.get('CUDA_VISIBLE_DEVICES')}"}


def filed_run(run: Run, out: Path) -> dict[str, Any]:
    """Do as `fake_run`, with a sample, a checkpoint and the folder that it worked in."""
    for name in ("step-0001/image.png", "checkpoint/state"):
        (out / run.name / name).parent.mkdir(parents=True, exist_ok=True)
        (out / run.name / name).write_text(name)
    return {**fake_run(run, out), "error": str(out)}


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find this file."""
    paths = (str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture
def two_nodes(importable: None) -> Iterator[Any]:
    """A cluster of two nodes, each with one CPU and one GPU that is said to be there, and a head that does no run."""
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    nodes.workers = [nodes.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    nodes.wait_for_nodes()
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_a_cluster_of_this_machine_is_started_and_ended(importable: None, tmp_path: Path) -> None:
    experiment, heard = experiment_of(tmp_path, **ONE, seeds=[0, 11]), []
    sweep = run_sweep(
        experiment, tmp_path / "out", cluster=Cluster(), run=fake_run, listener=lambda s, r: heard.append(r["seed"])
    )
    assert (sweep.count("finished"), sweep.count("failed")) == (1, 1) and sorted(heard) == [0, 11]
    assert "ValueError: no such thing" in records_in(tmp_path / "out")["self-lr0.001-seed11"]["error"]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".json"]
    assert not ray.is_initialized()
    assert run_sweep(experiment, tmp_path / "out", cluster=Cluster(), run=fake_run).total == 0


@pytest.mark.slow
def test_every_node_takes_runs_and_a_killed_worker_is_replaced(two_nodes: Any, tmp_path: Path) -> None:
    experiment, out = experiment_of(tmp_path, **ONE, seeds=[12, 31, 40, 41]), tmp_path / "out"
    sweep = run_sweep(experiment, out, cluster=Cluster(two_nodes.address), run=placed_run)
    found = records_in(out)
    assert (sweep.count("finished"), sweep.count("failed")) == (3, 1)
    assert calls(tmp_path) == {f"self-lr0.001-seed{seed}": n for seed, n in ((12, 3), (31, 2), (40, 1), (41, 1))}
    lost = found["self-lr0.001-seed12"]
    assert "its process or node was gone" in lost["error"] and "after 3 tries" in lost["error"]
    places = {found[f"self-lr0.001-seed{seed}"]["error"].split()[0] for seed in (31, 40, 41)}
    assert len(places) == 2
    assert all(found[f"self-lr0.001-seed{seed}"]["error"].split()[1] == "0" for seed in (31, 40, 41))  # a GPU each


@pytest.mark.slow
def test_a_run_asks_for_what_it_is_said_to_need(two_nodes: Any, tmp_path: Path) -> None:
    experiment, out = experiment_of(tmp_path, **ONE, seeds=[0, 1]), tmp_path / "out"
    run_sweep(experiment, out, cluster=Cluster(two_nodes.address, gpus=0, jobs=1), run=placed_run)
    assert {record["error"].split()[1] for record in records_in(out).values()} <= {"", "None"}


@pytest.mark.slow
def test_what_a_node_without_the_folder_writes_comes_back(
    importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def elsewhere(path: Path, folder: bool = False) -> Iterator[Path]:
        yield path.parent / "not-here" / path.name

    experiment, out = experiment_of(tmp_path, **ONE), tmp_path / "out"
    run_sweep(experiment, tmp_path / "shared", cluster=Cluster(), run=filed_run)
    monkeypatch.setattr(cluster_module, "temporary", elsewhere)
    run_sweep(experiment, out, cluster=Cluster(), run=filed_run)
    for folder in (tmp_path / "shared", out):
        (record,) = records_in(folder).values()
        assert (record["error"] == str(folder)) == (folder != out)
        assert [p.name for p in (folder / "self-lr0.001-seed0").rglob("*") if p.is_file()] == ["image.png"]


@pytest.mark.slow
def test_a_removed_node_loses_no_run_and_no_finished_run_runs_again(two_nodes: Any, tmp_path: Path) -> None:
    experiment, out, removed = experiment_of(tmp_path, **ONE, seeds=[0, 40, 41, 42, 43]), tmp_path / "out", []
    kept = set()

    def listener(sweep: Any, record: dict[str, Any]) -> None:
        if len(sweep.records) == 3 and not removed:
            kept.update(calls(tmp_path))
            kept.intersection_update(records_in(out))
            removed.append(two_nodes.workers[1].node_id)
            wait_until(lambda: calls(tmp_path).total() >= 5)  # the next run has begun on each
            two_nodes.remove_node(two_nodes.workers[1], allow_graceful=False)

    sweep = run_sweep(experiment, out, cluster=Cluster(two_nodes.address), run=placed_run, listener=listener)
    counted = calls(tmp_path)
    assert sweep.count("finished") == 5 and removed and len(kept) == 3
    assert all(counted[name] == 1 for name in kept)
    assert counted.total() == 6, counted  # the control: the one on the removed node had begun, and began again


DRIVER = """
import sys
from pathlib import Path
from cntlora.lab.experiments.cluster import Cluster
from cntlora.lab.experiments.sweep import run_sweep
from tests.lab import test_experiments_cluster as t
if __name__ == "__main__":
    folder, address, seeds = Path(sys.argv[1]), sys.argv[2] or None, [int(s) for s in sys.argv[3].split(",")]
    try:
        experiment = t.experiment_of(folder, **t.ONE, seeds=seeds)
        run_sweep(experiment, folder / "out", cluster=Cluster(address), run=t.placed_run)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@contextmanager
def driver(folder: Path, address: str, seeds: str) -> Iterator[subprocess.Popen[bytes]]:
    """A sweep in a process group of its own, as in a terminal."""
    script = folder / "driver.py"
    script.write_text(DRIVER)
    process = subprocess.Popen([sys.executable, script, folder, address, seeds], start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def alive(folder: Path) -> list[int]:
    """Processes of runs that still exist."""
    log = folder / "log"
    pids = [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_stopped(two_nodes: Any, tmp_path: Path) -> None:
    out, seeds = tmp_path / "out", [0, 1, 40, 41, 42, 43]
    with driver(tmp_path, two_nodes.address, ",".join(map(str, seeds))) as process:
        wait_until(lambda: len(list(out.glob("*.json"))) >= 3)
        process.kill()
        process.wait()
        wait_until(lambda: not alive(tmp_path), 60)  # no run goes on without its driver
    before = {path.stem: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert 3 <= len(before) < 6 and all(record["status"] == "finished" for record in records_in(out).values())
    sweep = run_sweep(
        experiment_of(tmp_path, **ONE, seeds=seeds), out, cluster=Cluster(two_nodes.address), run=placed_run
    )
    after = {path.stem: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert len(after) == 6 and sweep.total == sweep.count("finished") == 6 - len(before)
    assert {name: after[name] for name in before} == before
    assert all(calls(tmp_path)[name] == 1 for name in before)
    assert {path.suffix for path in out.iterdir()} == {".json"}


@pytest.mark.slow
@pytest.mark.parametrize("running", [True, False])
def test_ctrl_c_cancels_what_runs_and_keeps_what_is_finished(
    running: bool, importable: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On a cluster that is running, and on one that the sweep has started."""
    address = request.getfixturevalue("two_nodes").address if running else ""
    with driver(tmp_path, address, "0,20") as process:  # seed 20 takes a minute
        wait_until(lambda: calls(tmp_path)["self-lr0.001-seed20"] and list((tmp_path / "out").glob("*.json")))
        assert alive(tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
        wait_until(lambda: not alive(tmp_path), 30)
    assert [*records_in(tmp_path / "out")] == ["self-lr0.001-seed0"]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json"}
    if running:
        ray.init(address)
        assert sum(node["Alive"] for node in ray.nodes()) == 3


# --- the command --------------------------------------------------------------------------------------------------

FILE = """
[train]
steps = 2
[sweep]
methods = ["lora", "self"]
learning_rates = [1e-3]
seeds = [0]
"""


@pytest.mark.slow
def test_the_command_on_a_cluster_gives_what_it_gives_here(importable: None, tmp_path: Path) -> None:
    (tmp_path / "trial.toml").write_text(FILE)
    found = {}
    for engine in ("local", "ray"):
        out = tmp_path / engine
        arguments = ["compare", tmp_path / "trial.toml", "--smoke", "--jobs", "1", "--engine", engine, "--out", out]
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        assert "2 finished" in done.stdout and re.search(r"^CNTLoRA-S", done.stdout, re.MULTILINE)
        found[engine] = {name: record["losses"] for name, record in records_in(out).items()}
    assert found["ray"] == found["local"] and len(found["ray"]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--engine", "dask"], "--engine: expected local or ray, got 'dask'"),
        (["--address", "auto"], "--address, --cpus and --gpus are for --engine ray"),
        (["--cpus", "2"], "--address, --cpus and --gpus are for --engine ray"),
    ],
)
def test_options_that_do_not_go_together_are_told(arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["run", "none.toml", *arguments])
    assert done.exit_code == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1
