"""Runs functions of a test module in several processes, which are forked from one that has imported everything once.

A job is a function `job(rank, world, folder)` of the module whose result can be written as JSON; it connects itself.
`python -m tests.processes MODULE FOLDER JOB:WORLD ...` runs jobs one after the other.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

SECONDS = 300.0
"""After so long a job hangs: it takes seconds on a quiet machine, and a minute on a busy one."""


def connect(rank: int, world: int, folder: Path, seconds: float = 120.0) -> None:
    """Join a gloo group that gives up after `seconds`."""
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds))


def run(file: str, folder: Path, jobs: dict[str, int]) -> dict[str, list[Any]]:
    """Return what every job of a test file gives, by rank; the text of its error for a rank without a result."""
    wanted = [f"{job}:{world}" for job, world in jobs.items()]
    root = str(Path(__file__).parents[1])
    module = ".".join(Path(file).resolve().relative_to(root).with_suffix("").parts)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes", module, str(folder), *wanted],
        env=environment, cwd=root, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {job: [_result(folder / job / str(rank)) for rank in range(world)] for job, world in jobs.items()}


def _result(path: Path) -> Any:
    if path.with_suffix(".json").exists():
        return json.loads(path.with_suffix(".json").read_text())
    return path.with_suffix(".txt").read_text() if path.with_suffix(".txt").exists() else "ended without a word"


def outcome(call: Any) -> dict[str, Any]:
    """Return what an error says, and how long it took to come."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        cause = type(error.__cause__).__name__ if error.__cause__ else None
        text = f"{type(error).__name__}: {error}"
        return {"message": text, "cause": cause, "seconds": time.monotonic() - start}
    return {"message": "no error", "cause": None, "seconds": time.monotonic() - start}


def _fork(job: Any, world: int, folder: Path) -> None:
    """One process a rank; waits for all, and ends those that hang."""
    folder.mkdir()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _child(job, rank, world, folder)
        children.append(child)
    end = time.monotonic() + SECONDS
    while children and time.monotonic() < end:
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
        time.sleep(0.02)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)


def _child(job: Any, rank: int, world: int, folder: Path) -> None:
    """Never returns: what pytest or the parent would do on leaving is not this process's."""
    try:
        result = json.dumps(job(rank, world, folder))
        (folder / f"{rank}.json").write_text(result)
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(0)


def main(module: str, folder: str, *jobs: str) -> None:
    import torch

    warnings.simplefilter("ignore")
    code = importlib.import_module(module)
    torch.set_num_threads(1)  # also where the module has imported conftest, which sets another number
    for name, _, world in (job.partition(":") for job in jobs):
        _fork(getattr(code, name), int(world), Path(folder) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
