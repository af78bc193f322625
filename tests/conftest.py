"""Fixtures of all tests: one thread, no hub, a fresh interpreter, a process group of one.

`CNTLORA_TEST_THREADS=4 pytest` runs them with the work side by side in as many threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
THREADS = int(os.environ.get("CNTLORA_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)

RunFresh = Callable[..., str]


@pytest.fixture(autouse=True)
def _the_same_threads_for_every_test() -> Iterator[None]:
    """A test may set the number of threads; the next one does not see it."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def run_fresh(tmp_path_factory: pytest.TempPathFactory) -> RunFresh:
    """Runs a script in a new interpreter and returns what it prints; `block` makes importing cntlora an error."""

    def run(script: str, *arguments: object, block: bool = False) -> str:
        head = "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        if block:
            head += "sys.modules['cntlora'] = None\n"
        path = tmp_path_factory.mktemp("fresh") / "script.py"
        path.write_text(head + script)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
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
