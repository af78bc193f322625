"""The runs of a sweep as tasks of a Ray cluster: Ray places, retries and cancels them, and this process writes records.

A run has a worker process of its own. It works in the folder of the records where its node sees that folder, else in a
temporary one, and what it wrote there comes back with its record.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...atomic import temporary, write_atomically
from ...extras import require
from ...messages import in_short, warn_caller
from ..record import RunRecord, write_record
from .processes import UNKNOWN, RunFunction, cores, record_of
from .runs import Run, checkpoints_of, failed, path_of, remove_checkpoints

RETRIES = 2
"""How often a run whose process or node is gone is tried again."""
_STORE = 2**28  # bytes in which a cluster of this machine passes results on
_DEFAULTS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_task_oom_retries": str(RETRIES), "RAY_DEDUP_LOGS": "0"}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each run gets of it.

    Attributes:
        address: of a running cluster, as `ray.init` takes it; None for RAY_ADDRESS, and where that is not set for a
            cluster of this machine alone, which ends with the sweep.
        cpus: of a run, its number of threads, too.
        gpus: of a run, also less than one; None for one if the cluster has GPUs.
        jobs: most runs side by side; None for as many as there is room for.
    """

    address: str | None = None
    cpus: int = 1
    gpus: float | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.cpus < 1 or (self.gpus or 0) < 0:
            raise ValueError(f"--cpus, --gpus: expected at least 1 and 0, got {self.cpus} and {self.gpus}")


@dataclass
class ClusterRuns:
    """Keeps a cluster busy; see `processes.Pool`, which does the same on one machine without Ray."""

    out: Path
    cluster: Cluster
    function: RunFunction | None
    ended: Callable[[RunRecord], None]

    def work(self, pending: list[Run]) -> None:
        """Run all; on any exception (Ctrl-C above all) what is running is cancelled."""
        with _connected(self.cluster) as ray, temporary(self.out.resolve() / "sweep") as mark:
            task = ray.remote(**self._options(ray))(_work)
            most = self.cluster.jobs or len(pending)
            waiting, running = list(reversed(pending)), dict[Any, Run]()
            try:
                while waiting or running:
                    while waiting and len(running) < most:
                        run = waiting.pop()
                        running[task.remote(run, mark, Path.cwd(), self.cluster.cpus, self.function)] = run
                    for done in ray.wait(list(running))[0]:
                        self.ended(self._record(ray, done, running.pop(done)))
            finally:
                for one in running:
                    ray.cancel(one, force=True)

    def _options(self, ray: Any) -> dict[str, Any]:
        """Return what each task asks for, and tell of what no node can give now."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")}
        gpus = self.cluster.gpus if self.cluster.gpus is not None else min(1, most["GPU"])
        for kind, wanted in (("CPU", self.cluster.cpus), ("GPU", gpus)):
            if wanted > most[kind]:
                warn_caller(f"--{kind.lower()}s {wanted:g}: no node has more than {most[kind]:g} now; waiting for one")
        return {"num_cpus": self.cluster.cpus, "num_gpus": gpus, "max_calls": 1, "max_retries": RETRIES}

    def _record(self, ray: Any, done: Any, run: Run) -> RunRecord:
        """Write the record of a task that has ended: what it gave, or why it gave nothing."""
        try:
            record, files = ray.get(done)
        except ray.exceptions.RayError as error:
            record, files = failed(run, UNKNOWN, _reason(error)), None
        if files is not None:
            shutil.rmtree(self.out / run.name, ignore_errors=True)
            for name, content in files.items():
                write_atomically(self.out / name, content)
        write_record(path_of(self.out, run), record)
        remove_checkpoints(self.out, run, record)
        return record


def _reason(error: Exception) -> str:
    """Return why a task gave no record."""
    tries = f"after {RETRIES + 1} tries; {in_short(error)}"
    return f"its process or node was gone ({type(error).__name__}), perhaps for want of memory, {tries}"


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected; a connection, or a cluster, that is there already is used and stays."""
    require("ray", "--engine ray")
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray

    ours = not ray.is_initialized()
    if ours:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address := cluster.address or os.environ.get("RAY_ADDRESS"):
            ray.init(address, **quiet)
        else:
            ray.init("local", num_cpus=cores(), include_dashboard=False, object_store_memory=_STORE, **quiet)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _work(
    run: Run, mark: Path, here: Path, threads: int, function: RunFunction | None
) -> tuple[RunRecord, Mapping[str, bytes] | None]:
    """Make the record of a run in a process of its own, on any node, and read the files that belong to it.

    Args:
        run: what to run.
        mark: a file in the folder of the records, which is there if this node sees that folder.
        here: the working directory of the sweep, to which paths of models and data refer.
        threads, function: see `record_of`.

    Returns:
        The record, and path → content relative to the folder of the records; None where they are there already.
    """
    if here.is_dir():
        os.chdir(here)
    shared = mark.exists()
    with nullcontext(mark.parent) if shared else tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        record = record_of(run, out, threads, function)
        if shared:
            return record, None
        shutil.rmtree(checkpoints_of(out, run), ignore_errors=True)
        return record, {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
