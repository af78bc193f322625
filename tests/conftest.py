"""Fixtures of all tests: one thread, no hub, a fresh interpreter, a process group of one.

`pytest -n auto` runs the tests side by side, one thread each; `CNTLORA_TEST_THREADS=4 pytest` gives each four threads.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

THREADS = int(os.environ.get("CNTLORA_TEST_THREADS", "1"))
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before NumPy and torch are loaded; processes inherit them
    os.environ[_name] = str(THREADS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(THREADS)

RunFresh = Callable[..., str]

WORKERS = 8
"""Most workers of `pytest -n auto`: beyond, the longest file decides."""
WORKER_BYTES = 3 * 2**30
"""Memory of a worker that has imported torch, transformers and diffusers and has a subprocess or two of the kind."""


def pytest_xdist_auto_num_workers() -> int:
    """Workers of `pytest -n auto`: as many as cores and free memory allow; 0 (pytest itself) where that is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores // THREADS, _free_memory() // WORKER_BYTES, WORKERS)
    return workers if workers > 1 else 0


def _free_memory() -> int:
    """Bytes that new processes may have."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return free[0] if free else WORKERS * WORKER_BYTES  # not Linux


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_out_of_sight() -> None:
    """A garbage collection, which trainers ask for, would look through all that the libraries made when imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _the_same_for_every_test() -> Iterator[None]:
    """A test may draw numbers and set the number of threads; the next one in its process does not see it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def run_fresh(tmp_path_factory: pytest.TempPathFactory) -> RunFresh:
    """Run a script in a new interpreter and return what it prints; `block` makes importing cntlora an error."""

    def run(script: str, *arguments: object, block: bool = False, threads: int = 1) -> str:
        head = "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        if block:
            head += "sys.modules['cntlora'] = None\n"
        path = tmp_path_factory.mktemp("fresh") / "script.py"
        path.write_text(head + script)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, str(path), *map(str, arguments)],
            capture_output=True, text=True, env=environment, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A gloo process group of this process alone, so that a model can be wrapped in DDP."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
