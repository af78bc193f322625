"""SIGKILL leaves the old file or the new one, and nothing that the next run does not clear away."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kill_cases import Moment, hidden, moments, prepared, run_command, run_fork, survives
from tests.lab.test_experiments_sweep import wait_until
from tests.tiny import adapted, text_batches

from cntlora import InitConfig, InitPlan, compute_plan, initialize, save_adapter
from cntlora.atomic import remove_leftovers, temporary, write_atomically
from cntlora.files.inspection import inspect_adapter
from cntlora.lab.record import read_record, write_record

Write = Callable[[Path], object]


def record(losses: int) -> dict[str, Any]:
    return {"schema": 1, "status": "finished", "losses": [0.1] * losses}


@pytest.fixture(scope="module")
def written() -> dict[str, tuple[Write, Write, Write]]:
    """A writer: old files, new files, and the reader of both."""
    plans = [compute_plan(adapted(), text_batches(n), config=InitConfig(method="self")) for n in (1, 2)]
    models = [adapted(r=r) for r in (2, 4)]
    for model in models:
        initialize(model, text_batches(), config=InitConfig(method="self"))
    return {
        "plan": (
            lambda f: plans[0].save(f / "plan"),
            lambda f: plans[1].save(f / "plan"),
            lambda f: InitPlan.load(f / "plan").batches,
        ),
        "record": (
            lambda f: write_record(f / "r.json", record(10)),
            lambda f: write_record(f / "r.json", record(9000)),
            lambda f: len(read_record(f / "r.json")["losses"]),
        ),
        "adapter": (
            lambda f: None,
            lambda f: save_adapter(models[1], f / "adapter"),
            lambda f: [s.rank for s in inspect_adapter(f / "adapter")] if (f / "adapter").exists() else None,
        ),
    }


@pytest.mark.parametrize("name", ["plan", "record", "adapter"])
def test_killed_before_any_change_of_a_file(written: Any, name: str, tmp_path: Path) -> None:
    write_old, write_new, read = written[name]
    (tmp_path / "a").mkdir()
    write_old(tmp_path / "a")
    old = read(tmp_path / "a")
    whole = run_fork(lambda: write_new(tmp_path / "a"), tmp_path / "a")
    new = read(tmp_path / "a")
    assert whole.code == 0 and old != new and whole.changes >= 3
    seen = []
    for change in range(1, whole.changes + 1):
        folder = tmp_path / str(change)
        folder.mkdir()
        write_old(folder)
        ended = run_fork(lambda f=folder: write_new(f), folder, Moment(change=change))  # type: ignore[misc]
        assert ended.killed
        seen.append(read(folder))
        assert all(left.endswith(".cntlora") for left in hidden(folder))
        write_new(folder)
        assert read(folder) == new and not hidden(folder)
    assert set(map(str, seen)) <= {str(old), str(new)} and str(old) in map(str, seen)


def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with temporary(path) as unfinished:
        assert remove_leftovers(tmp_path, path.name) == remove_leftovers(tmp_path) == 0 and unfinished.exists()
        write_atomically(path, b"other")
        assert unfinished.exists() and path.read_bytes() == b"other"
    (tmp_path / ".file.abcdefgh.cntlora").write_text("of a killed process")
    for stranger in (".file.original", ".file.abcdefgh", ".files.abcdefgh.cntlora", "file.abcdefgh.cntlora"):
        (tmp_path / stranger).write_text("of the user")
    assert remove_leftovers(tmp_path, path.name) == 1
    assert len(list(tmp_path.iterdir())) == 5
    assert remove_leftovers(tmp_path) == 1 and len(list(tmp_path.iterdir())) == 4  # of another file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["init", "run", "compare", "export"])
def test_commands_survive_kills(name: str, tmp_path: Path) -> None:
    generator = random.Random(name)
    (command,) = [c for c in prepared(tmp_path) if c.name == name]
    old = tmp_path / "old"
    old.mkdir()
    first = run_command(command.arguments(old, False), old)
    assert first.code == 0, first.told
    killed = [survives(command, old, m)[0].killed for m in moments(first.changes, first.seconds, 10, generator)]
    assert sum(killed) >= 5


SERVER = """
import sys
from cntlora.cli.app import main
if __name__ == "__main__":
    sys.argv = ["cntlora", "run", *sys.argv[1:]]
    main()
"""


@pytest.mark.slow
def test_the_real_command_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    """Not a fork: with its server of processes, by SIGINT to the group as a terminal sends it, and by SIGKILL."""
    script, experiment = tmp_path / "script.py", Path(__file__).parents[2] / "studies" / "tweets.toml"
    script.write_text(SERVER)
    for number, (sent, wait) in enumerate(((signal.SIGINT, 0.1), (signal.SIGINT, 4.0), (signal.SIGKILL, 2.0))):
        out = tmp_path / f"out{number}"
        process = subprocess.Popen(
            [sys.executable, str(script), str(experiment), "--smoke", "--out", str(out)],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        wait_until(out.exists)  # its own imports are done, and those of its server begin
        time.sleep(wait)
        os.killpg(process.pid, sent)
        began = time.monotonic()
        process.wait(60)
        seconds = time.monotonic() - began
        told = process.communicate(timeout=60)[1].decode()  # its server has stderr until it has imported what it should
        if sent == signal.SIGINT:
            assert process.returncode == 130 and seconds < 2, seconds
            assert "Traceback" not in told and told.count("cntlora: stopped") == 1, told
        assert all(read_record(path) for path in out.glob("*.json"))
